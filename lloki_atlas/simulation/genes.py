"""Genes of the simulated tissue: symbols, marker programmes, and the expression of every cell type."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lloki_atlas.simulation.tissue import CELL_TYPES, COARSE_OF_TYPE, COARSE_TYPES

EXCITATORY = ("L2/3 IT", "L4 IT", "L5 IT", "L6 CT", "L6b")
INHIBITORY = ("Pvalb", "Sst", "Vip", "Lamp5")
NEURONS = EXCITATORY + INHIBITORY

# markers: strong in these types, low elsewhere
PROGRAMMES: tuple[tuple[tuple[str, ...], str], ...] = (
    (NEURONS, "Snap25 Syt1 Rbfox3 Stmn2 Meg3 Thy1 Nefl Nefm Eno2 Uchl1 Syn1 Map2"),
    (EXCITATORY, "Slc17a7 Neurod6 Satb2 Camk2a Nrgn Neurod2 Tbr1 Slc30a3 Nptx1 Chn1 Ptk2b Baiap2 Sv2b Itpka"),
    (INHIBITORY, "Gad1 Gad2 Slc32a1 Slc6a1 Erbb4 Dlx1 Dlx2 Dlx6os1 Arx Grip1 Gabrg3 Kcnip1"),
    (("L2/3 IT", "L4 IT"), "Cux1 Pou3f2 Pou3f3 Mdga1 Lmo4 Kcnip2"),
    (("L5 IT", "L6 CT", "L6b"), "Bcl11b Crym Sox5 Pcp4 Nfib Tshz2"),
    (("Pvalb", "Sst"), "Lhx6 Sox6 Satb1 Maf Mafb Nxph1"),
    (("Vip", "Lamp5"), "Adarb2 Prox1 Nr2f2 Sp8 Npas3 Kit"),
    (("L2/3 IT",), "Cux2 Otof Calb1 Rasgrf2 Cdh13 Wfs1 Enpp2 Ccdc80 Matn2 Inhba Adamts2 Igfbp4"),
    (("L4 IT",), "Rorb Scnn1a Rspo1 Whrn Brinp3 Unc5d Tox Plcxd2 Kcnh5 Endou Lmo3 Nectin3"),
    (("L5 IT",), "Fezf2 Etv1 Parm1 Deptor Fam84b Chrna6 Sulf2 Npr3 Pou3f1 Ccn3 Bcl6 Myl4 Stac Qrfpr"),
    (("L6 CT",), "Foxp2 Syt6 Ntsr1 Rprm Tle4 Sla Hs3st4 Col5a1 Garnl3 Nxph3 Trbc2 Gpr139"),
    (("L6b",), "Ccn2 Cplx3 Nxph4 Moxd1 Svil Drd1 Trh Nr4a2 Clic5 Inpp4b"),
    (("Pvalb",), "Pvalb Syt2 Pthlh Tac1 Cox6a2 Cplx1 Kcnc1 Eya4 Akr1c18 Vamp1 Kcnab3 Cpne5"),
    (("Sst",), "Sst Chodl Crhbp Hpse Nos1 Myh8 Pdyn Grin3a Elfn1 Lypd6 Npy Cbln4"),
    (("Vip",), "Vip Calb2 Crh Cck Chat Htr3a Tac2 Crispld2 Igfbp6 Penk Sncg Npas1"),
    (("Lamp5",), "Lamp5 Ndnf Reln Krt73 Cxcl14 Npy2r Id2 Rgs12 Egln3 Ntn1 Dock5 Gabrd"),
    (("Astro", "OPC"), "Apoe Ptprz1 Bcan Plpp3 Fabp7 Ntrk2"),
    (("Astro",), "Aqp4 Gfap Gja1 Slc1a3 Slc1a2 Aldh1l1 Aldoc Mfge8 Sox9 Gjb6 Agt Fgfr3 Ntsr2 Acsbg1 Slc4a4 Clu"),
    (("Oligo", "OPC"), "Sox10 Olig1 Olig2 Gpr37l1 Bcas1 Sirt2"),
    (("Oligo",), "Plp1 Mbp Mobp Mog Mag Opalin Mal Cldn11 Cnp Ermn Anln Itpr2 Ugt8a Aspa Gjb1 Trf"),
    (("OPC",), "Pdgfra Cspg4 Gpr17 Cacng4 Bmp4 C1ql1 Neu4 Lhfpl3 Vcan Tnr Enpp6 Pcdh15"),
    (("Micro",), "Ctss Hexb C1qa C1qb C1qc Cx3cr1 P2ry12 Tmem119 Csf1r Trem2 Tyrobp Selplg Mrc1 Laptm5 Siglech Aif1"),
    (("Endo", "Mural"), "Igfbp7 Sparc Epas1 Bgn Cald1 Ifitm3"),
    (("Endo",), "Flt1 Cldn5 Pecam1 Ly6c1 Itm2a Slco1a4 Adgrl4 Tek Cdh5 Kdr Abcb1a Slc2a1 Egfl7 Emcn Esam Ptprb"),
    (("Mural",), "Vtn Rgs5 Acta2 Kcnj8 Abcc9 Pdgfrb Tagln Higd1b Myl9 Notch3 Ndufa4l2 Anpep Serpinf1 Atp13a5"),
)

# housekeeping, channels, receptors, adhesion, signalling, transcription: broad, with mild differences between types
BACKGROUND = """
Actb Gapdh Tubb5 Tuba1a Ubb Ubc Hprt Ppia Pgk1 Eef1a1 Eef2 Rpl3 Rpl10 Rps3 Rps6 Hsp90ab1 Hspa8 Calm1 Calm2 Calm3 Ywhaz
Ywhag Ldhb Aldoa Pkm Tpi1 Mdh1 Cox4i1 Cox6c Atp5b Atp1a1 Atp1a3 Atp1b1 Atp2b1 Atp2b2 Ndufa4 Uqcrh Cst3 Itm2b Itm2c
Kcna1 Kcna2 Kcna4 Kcnb1 Kcnb2 Kcnc2 Kcnc3 Kcnd2 Kcnd3 Kcnj3 Kcnj6 Kcnj9 Kcnk1 Kcnk2 Kcnma1 Kcnn2 Kcnq2 Kcnq3 Kcnq5
Kcns2 Kcnt1 Kcnt2 Kcnv1 Kcnmb4 Scn1a Scn1b Scn2a Scn3a Scn3b Scn8a Cacna1a Cacna1c Cacna1d Cacna1e Cacna1g Cacna1h
Cacna2d1 Cacna2d3 Cacnb4 Cacng3 Gabra1 Gabra2 Gabra3 Gabra4 Gabra5 Gabrb1 Gabrb2 Gabrb3 Gabrg1 Gabrg2 Gria1 Gria2
Gria3 Gria4 Grin1 Grin2a Grin2b Grik1 Grik2 Grik3 Grik4 Grm1 Grm3 Grm5 Grm7 Grm8 Chrm1 Chrm2 Chrm3 Chrna4 Chrna7
Chrnb2 Htr1a Htr1f Htr2a Htr2c Adra1a Adra1b Adra2a Adrb1 Drd2 Oprk1 Oprm1 Oprd1 Cnr1 Tacr1 Tacr3 Sstr1 Sstr2 Sstr4
Npy1r Vipr1 Vipr2 Crhr1 Crhr2 Galr1 Hcrtr2 P2rx7 Adora1 Ptger3 Cdh4 Cdh6 Cdh7 Cdh8 Cdh9 Cdh10 Cdh11 Cdh12 Cdh18 Cdh20
Pcdh7 Pcdh8 Pcdh9 Pcdh10 Pcdh17 Pcdh19 Pcdh20 Nrxn1 Nrxn3 Nlgn1 Cntn1 Cntn2 Cntn3 Cntn4 Cntn5 Cntnap2 Cntnap4 Cntnap5a
Lrrtm1 Lrrtm3 Lrrtm4 Lrfn5 Flrt2 Flrt3 Slitrk1 Slitrk3 Robo1 Robo2 Slit1 Slit2 Slit3 Epha3 Epha4 Epha5 Epha6 Epha7
Ephb1 Efna5 Efnb3 Sema3a Sema3c Sema3d Sema3e Sema5a Sema6d Plxna2 Plxna4 Plxnd1 Nrp1 Nrp2 Unc5b Unc5c Dcc Ntng1 Ntng2
Tenm1 Tenm2 Tenm3 Tenm4 Ptprd Ptprk Ptprm Ptpru Thsd7a Thsd7b Nell1 Nell2 Ncam2 Negr1 Opcml Bdnf Ntf3 Ngf Igf1 Igf2
Fgf1 Fgf9 Fgf10 Fgf13 Fgf14 Vegfa Tgfb2 Bmp3 Bmpr1b Wnt4 Wnt5a Wnt7b Fzd3 Sfrp1 Dkk3 Egr1 Egr2 Egr3 Egr4 Fos Fosb
Fosl2 Junb Jund Arc Npas4 Nr4a1 Nr4a3 Homer1 Nptx2 Vgf Btg2 Dusp1 Dusp6 Per1 Meis1 Meis2 Pbx1 Pbx3 Zfhx3 Zfhx4 Zic1
Foxp1 Ikzf2 Lhx2 Lmo1 Id4 Hes5 Rora Rxrg Esrrg Mef2c Tcf4 Tcf7l2 Nfia Nfix Zbtb18 Zbtb20 Bhlhe22 Ebf1 Nr2f1 Nr3c2 Thrb
Tshz3 Prdm8 Camk2d Camk4 Prkca Prkcb Prkcg Prkg1 Pde1a Pde4b Pde7b Pde10a Rgs4 Rgs6 Rgs7 Rgs8 Rgs9 Rgs10 Rgs14 Ppp1r1b
Ppp1r1a Ppp3ca Dlgap1 Dlg2 Shank2 Shisa6 Shisa9 Synpr Syt4 Syt10 Syt17 Sv2c Cplx2 Stx1a
"""

MARKERS = tuple(symbol for _, text in PROGRAMMES for symbol in text.split())
REFERENCE_GENES = MARKERS + tuple(BACKGROUND.split())
# on a panel, but not in the annotation that the reference was aligned with
FOREIGN_GENES = ("1700022I11Rik", "5031425F14Rik", "Teddm3")
GENES = REFERENCE_GENES + FOREIGN_GENES

_N_STATES = 2
# log size of a cell's transcriptome; neurons are large, endothelial cells and microglia small
_LOG_SIZE = {"Excitatory": 0.35, "Inhibitory": 0.25, "Astrocyte": -0.1, "Microglia": -0.5, "Endothelial": -0.5}


@dataclass(frozen=True)
class Profiles:
    """Expression of the tissue, genes in the order of `GENES`.

    rate : (n_types, n_genes) float64, mean expression, arbitrary unit
    gradient : (2, n_genes) float64, log change per unit of a cell's smooth states
    dispersion : (n_genes,) float64, theta of the negative binomial (variance = mean + mean²/theta)
    """

    rate: np.ndarray
    gradient: np.ndarray
    dispersion: np.ndarray

    def __post_init__(self) -> None:
        n_genes = len(GENES)
        assert self.rate.shape == (len(CELL_TYPES), n_genes)
        assert self.gradient.shape == (_N_STATES, n_genes)
        assert self.dispersion.shape == (n_genes,)


def make_profiles(*, rng: np.random.Generator) -> Profiles:
    """Draw how strongly every type expresses every gene.

    Markers are on in the types of their programme and low elsewhere; all other genes are heavy tailed, differ
    between neurons and the rest, and between types at a few places.
    """
    n_types, n_genes = len(CELL_TYPES), len(GENES)
    log_rate = np.tile(rng.normal(-0.4, 1.0, size=n_genes), (n_types, 1))
    neuronal = np.isin(CELL_TYPES, NEURONS)
    log_rate[neuronal] += rng.normal(0.2, 0.5, size=n_genes)
    changed = rng.random((n_types, n_genes)) < 0.12
    log_rate += np.where(changed, rng.normal(0.0, 0.8, size=(n_types, n_genes)), 0.0)
    column = 0
    for types, text in PROGRAMMES:
        on = np.isin(CELL_TYPES, types)
        for _ in text.split():
            log_rate[:, column] = rng.normal(-1.3, 0.8) + rng.normal(0.0, 0.6, size=n_types)
            level = rng.normal(1.2, 0.7)
            log_rate[on, column] = level + rng.normal(0.0, 0.3, size=int(on.sum()))
            column += 1
    size = np.array([_LOG_SIZE.get(COARSE_TYPES[coarse], 0.0) for coarse in COARSE_OF_TYPE])
    gradient = rng.normal(0.0, 0.35, size=(_N_STATES, n_genes)) * (rng.random((_N_STATES, n_genes)) < 0.25)
    return Profiles(
        rate=np.exp(log_rate + size[:, None]),
        gradient=gradient,
        dispersion=0.3 + rng.gamma(2.0, 0.5, size=n_genes),
    )

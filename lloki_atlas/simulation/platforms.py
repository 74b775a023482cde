"""Platforms of the simulated slices: their panels, how well they see each gene, and the counts that follow."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lloki_atlas.simulation.genes import FOREIGN_GENES, GENES, REFERENCE_GENES, Profiles
from lloki_atlas.simulation.tissue import Cells, composition_by_depth


@dataclass(frozen=True)
class Platform:
    """One technology and what it does to counts.

    zero_fraction : share of zeros in the gene counts; sets the sensitivity
    efficiency_sd : standard deviation of the log efficiency of its genes
    depth_sd : standard deviation of the log capture of its cells
    spillover : mean share of a cell's signal that comes from its neighbourhood
    background : false counts per gene and cell, as a share of the panel's mean signal
    area_um2 : tissue area per segmented cell
    aliases : genes that its panel calls by another name, (symbol, name on the panel)
    """

    name: str
    zero_fraction: float
    efficiency_sd: float
    depth_sd: float
    spillover: float
    background: float
    area_um2: float
    n_controls: int = 0
    aliases: tuple[tuple[str, str], ...] = ()

    @property
    def slug(self) -> str:
        """Name for files and slice ids."""
        return self.name.lower().replace("-", "_")


SIMFISH = Platform("SimFISH", 0.35, 0.5, 0.45, 0.25, 0.010, 140.0)
SIMMAP = Platform("SimMAP", 0.73, 0.7, 0.40, 0.30, 0.020, 115.0, aliases=(("Ccn2", "Ctgf"), ("Ccn3", "Nov")))
SIMFISH_PLUS = Platform("SimFISH-plus", 0.78, 0.5, 0.45, 0.20, 0.010, 125.0, n_controls=5)
SIMISH = Platform("SimISH", 0.92, 0.9, 0.55, 0.20, 0.030, 110.0, n_controls=3)
PLATFORMS = (SIMFISH, SIMMAP, SIMFISH_PLUS, SIMISH)
DISSOCIATED = Platform("scRNA-seq (10x v3)", 0.76, 0.4, 0.40, 0.02, 0.001, float("nan"))

# the ten genes that all four panels share
CORE_GENES = ("Slc17a7", "Gad1", "Sst", "Rorb", "Cux2", "Foxp2", "Aqp4", "Plp1", "Flt1", "Ctss")
# genes that a small, hand-picked panel would hold, and the panels that hold them too
_CHOSEN: dict[tuple[Platform, ...], str] = {
    (SIMFISH, SIMMAP): "Vip Lamp5",
    (SIMFISH, SIMFISH_PLUS): "Pdgfra Vtn Gad2 Fezf2 Pvalb",
    (SIMFISH, SIMISH): "Gfap Hexb",
    (SIMFISH,): "Mrc1 Sox10 Anln Bmp4 Cpne5 Crhbp Kcnip2 Serpinf1 Mfge8 Itpr2 Syt6 Tbr1 Acta2 Cldn5",
    (SIMMAP, SIMFISH_PLUS): "Ccn2",
    (SIMMAP,): "Ccn3",
    (SIMFISH_PLUS,): " ".join(FOREIGN_GENES),
}
# how many of the other genes go to which panels; what is left is in the reference alone
_QUOTAS: dict[tuple[Platform, ...], int] = {
    (SIMMAP, SIMFISH_PLUS): 29,
    (SIMMAP, SIMISH): 18,
    (SIMFISH_PLUS, SIMISH): 20,
    (SIMMAP, SIMFISH_PLUS, SIMISH): 10,
    (SIMMAP,): 89,
    (SIMFISH_PLUS,): 172,
    (SIMISH,): 40,
}
_N_DEPTHS = 128


@dataclass(frozen=True)
class Assay:
    """A platform on one slice, ready to draw counts; columns are the panel's genes, then its controls.

    symbols : names as the platform writes them
    rate : (n_types, n_columns) expected counts of a cell of median capture
    neighbourhood : (n_depths, n_columns) expected counts that spill over from cells at that depth
    background : (n_columns,) expected false counts
    usable : (n_columns,) bool, genes that the reference has
    """

    symbols: tuple[str, ...]
    rate: np.ndarray
    neighbourhood: np.ndarray
    background: np.ndarray
    gradient: np.ndarray
    dispersion: np.ndarray
    depth_sd: float
    usable: np.ndarray


def panel_genes(platform: Platform) -> tuple[str, ...]:
    """Return the canonical symbols of a panel in its order: the core, chosen genes, then the rest; no controls."""
    if platform is DISSOCIATED:
        return tuple(sorted(REFERENCE_GENES))
    chosen = [symbol for members, text in _CHOSEN.items() if platform in members for symbol in text.split()]
    dealt = [symbol for symbol, members in _dealt_genes() if platform in members]
    return (*CORE_GENES, *sorted([*chosen, *dealt]))


def panel_symbols(platform: Platform) -> tuple[str, ...]:
    """Return the symbols as the platform writes them: old aliases of some genes, control probes last."""
    written = [dict(platform.aliases).get(symbol, symbol) for symbol in panel_genes(platform)]
    return (*written, *(f"Blank-{i + 1}" for i in range(platform.n_controls)))


def _dealt_genes() -> list[tuple[str, tuple[Platform, ...]]]:
    """Deal the other genes to the panels, evenly along the list, so that each panel gets markers of every type."""
    taken = {*CORE_GENES, *" ".join(_CHOSEN.values()).split()}
    free = [symbol for symbol in REFERENCE_GENES if symbol not in taken]
    quotas = {**_QUOTAS, (): len(free) - sum(_QUOTAS.values())}
    slots = [((i + 0.5) / quota, j, members) for j, (members, quota) in enumerate(quotas.items()) for i in range(quota)]
    slots.sort(key=lambda slot: slot[:2])
    return [(symbol, members) for symbol, (_, _, members) in zip(free, slots, strict=True)]


def make_assay(
    platform: Platform,
    profiles: Profiles,
    *,
    probe: Cells,
    platform_rng: np.random.Generator,
    slice_rng: np.random.Generator,
) -> Assay:
    """Set up a platform for one slice.

    Parameters
    ----------
    platform, profiles
        What measures, and what there is to measure.
    probe
        Some cells of the kind to be measured; the sensitivity is set on them so that the expected share of zeros is
        the platform's.
    platform_rng, slice_rng
        Efficiencies that the platform has in every slice, and the slice's own batch effect on them.
    """
    genes = panel_genes(platform)
    columns = np.array([GENES.index(symbol) for symbol in genes])
    log_efficiency = platform.efficiency_sd * platform_rng.normal(size=len(genes))
    log_efficiency += 0.12 * slice_rng.normal(size=len(genes))
    rate = profiles.rate[:, columns] * np.exp(log_efficiency)
    neighbourhood = np.zeros((_N_DEPTHS, len(genes)))
    for kind, share in enumerate(composition_by_depth(_N_DEPTHS).T):
        neighbourhood += share[:, None] * rate[kind]
    false = np.full(len(genes) + platform.n_controls, platform.background * float(neighbourhood.mean()))
    blank = ((0, 0), (0, platform.n_controls))
    assay = Assay(
        symbols=panel_symbols(platform),
        rate=np.pad((1.0 - platform.spillover) * rate, blank),
        neighbourhood=np.pad(platform.spillover * neighbourhood, blank),
        background=false,
        gradient=np.pad(profiles.gradient[:, columns], blank),
        dispersion=np.pad(profiles.dispersion[columns], blank[1], constant_values=1.0),
        depth_sd=platform.depth_sd,
        usable=np.array([symbol not in FOREIGN_GENES for symbol in genes] + [False] * platform.n_controls),
    )
    return _calibrated(assay, probe, zero_fraction=platform.zero_fraction, n_genes=len(genes), rng=slice_rng)


def draw_counts(assay: Assay, cells: Cells, *, rng: np.random.Generator) -> np.ndarray:
    """Draw the counts of a block of cells.

    x ~ Poisson(Gamma(theta, mean / theta)), a negative binomial. A cell without any count in a gene of the reference
    gets one in its strongest such gene: platforms do not report empty cells.

    Returns
    -------
    numpy.ndarray
        (n_cells, n_columns) int64.
    """
    mean = _expected(assay, cells, rng=rng)
    counts = rng.poisson(rng.standard_gamma(assay.dispersion, size=mean.shape) * mean / assay.dispersion)
    empty = np.flatnonzero(counts[:, assay.usable].sum(axis=1) == 0)
    strongest = np.where(assay.usable, mean[empty], -1.0).argmax(axis=1)
    counts[empty, strongest] = 1
    return counts


def _expected(assay: Assay, cells: Cells, *, rng: np.random.Generator) -> np.ndarray:
    """Mean counts of every cell and column: own signal, what spills over, and background.

    Capture is log-normal; spillover is gamma: most cells are clean, a few are badly segmented.
    """
    depth = assay.depth_sd * rng.normal(size=cells.n_cells)
    spilled = rng.standard_gamma(1.0, size=(cells.n_cells, 1))
    state = cells.state
    log_change = state[:, [0]] * assay.gradient[0] + state[:, [1]] * assay.gradient[1] + depth[:, None]
    bins = np.minimum((cells.depth * _N_DEPTHS).astype(np.int64), _N_DEPTHS - 1)
    return assay.rate[cells.cell_type] * np.exp(log_change) + spilled * assay.neighbourhood[bins] + assay.background


def _calibrated(assay: Assay, probe: Cells, *, zero_fraction: float, n_genes: int, rng: np.random.Generator) -> Assay:
    """Scale every mean so that the expected share of zeros in the genes is `zero_fraction`, by bisection.

    P(x = 0) = (1 + mean / theta)^-theta
    """
    mean = _expected(assay, probe, rng=rng)[:, :n_genes]
    theta = assay.dispersion[:n_genes]
    low, high = -20.0, 20.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        zeros = float(np.exp(-theta * np.log1p(np.exp(middle) * mean / theta)).mean())
        low, high = (middle, high) if zeros > zero_fraction else (low, middle)
    scale = float(np.exp(middle))
    scaled = {name: scale * getattr(assay, name) for name in ("rate", "neighbourhood", "background")}
    return replace(assay, **scaled)

"""Symbols: what maps to what, and what the report says."""

from __future__ import annotations

import csv
import re
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lloki_atlas.errors import InputError
from lloki_atlas.stages.genes import OUTCOMES, map_symbols, tables_digest


def one(symbol, organism="mouse", *, gene_map=None):
    genes = map_symbols([symbol], organism=organism, gene_map=gene_map)
    return genes.canonical[0], genes.how[0]


def table(name):
    text = resources.files("lloki_atlas.stages").joinpath("gene_tables", name).read_text()
    return list(csv.reader(text.splitlines(), delimiter="\t"))[1:]


@pytest.mark.parametrize(
    ("symbol", "canonical", "how"),
    [
        ("Gad1", "GAD1", "exact"),
        ("GAD1", "GAD1", "exact"),
        ("mt-Co1", "MT-CO1", "exact"),
        ("Zfp36", "ZFP36", "exact"),
        ("Ctgf", "CCN2", "alias"),
        ("Nov", "CCN3", "alias"),
        ("Cyr61", "CCN1", "alias"),
        ("Fam19a1", "TAFA1", "alias"),
        ("Fam19a2", "TAFA2", "alias"),
        ("Gpr114", "ADGRG5", "alias"),
        ("Ctps", "CTPS1", "alias"),
        ("Tmem2", "CEMIP2", "alias"),
        ("Fam84b", "LRATD2", "alias"),
        ("March1", "MARCHF1", "alias"),
        ("Car4", "CA4", "ortholog"),
        ("Cd24a", "CD24", "ortholog"),
        ("Trp53i11", "TP53I11", "ortholog"),
        ("Tac2", "TAC3", "ortholog"),
        ("Man1a", "MAN1A1", "ortholog"),
        ("Zfp804b", "ZNF804B", "ortholog"),
        ("H2-Aa", "HLA-DQA1", "ortholog"),
        ("H2-D1", "H2-D1", "upper"),
        ("H2-Q10", "H2-Q10", "upper"),
        ("Gm2694", "GM2694", "upper"),
        ("1700022I11Rik", "1700022I11RIK", "upper"),
        ("Olfr286", "OLFR286", "upper"),
        ("ENSMUSG00000000001", "", "unmapped"),
        ("", "", "unmapped"),
        ("nan", "", "unmapped"),
        ("12345", "", "unmapped"),
    ],
)
def test_mouse_symbol_maps(symbol, canonical, how):
    assert one(symbol) == (canonical, how)


@pytest.mark.parametrize(
    ("symbol", "canonical", "how"),
    [
        ("CD3E", "CD3E", "exact"),
        ("C11orf21", "C11ORF21", "exact"),
        ("SEPP1", "SELENOP", "alias"),
        ("WARS", "WARS1", "alias"),
        ("AARS", "AARS1", "alias"),
        ("CXCL7", "PPBP", "alias"),
        ("RARRES3", "PLAAT4", "alias"),
        ("IL8", "CXCL8", "alias"),
        ("CAR4", "CAR4", "exact"),
        ("GM2A", "GM2A", "exact"),
        ("ENSG00000141510", "", "unmapped"),
    ],
)
def test_human_symbol_maps(symbol, canonical, how):
    assert one(symbol, "human") == (canonical, how)


@pytest.mark.parametrize("organism", ["mouse", "human"])
@pytest.mark.parametrize(
    "symbol",
    [
        "Blank-1",
        "BLANK_0001",
        "NegControlProbe_00042",
        "NegControlCodeword_0500",
        "NegPrb3",
        "Negative5",
        "SystemControl12",
        "UnassignedCodeword_0001",
        "DeprecatedCodeword_1",
        "antisense_LYZ",
        "eRNA1",
    ],
)
def test_control_is_dropped(symbol, organism):
    assert one(symbol, organism) == ("", "control")


@pytest.mark.parametrize("symbol", ["Negr1", "Ern1", "Blnk", "Unc5a"])
def test_gene_that_looks_like_a_control_is_kept(symbol):
    assert one(symbol) == (symbol.upper(), "exact")


def test_exact_symbol_keeps_the_canonical_one_whatever_the_order():
    for symbols, how in [(("Ctgf", "Ccn2"), ("collision", "exact")), (("Ccn2", "Ctgf"), ("exact", "collision"))]:
        genes = map_symbols(symbols, organism="mouse")
        assert genes.how == how
        assert sorted(genes.canonical) == ["", "CCN2"]


def test_first_of_two_equally_direct_symbols_keeps_it():
    genes = map_symbols(["Lyz2", "Lyz1"], organism="mouse")
    assert genes.canonical == ("LYZ", "")
    assert genes.how == ("ortholog", "collision")


def test_symbols_that_differ_in_case_alone_collide():
    assert map_symbols(["Gad1", "GAD1"], organism="mouse").how == ("exact", "collision")


def test_user_table_wins_over_ours_and_over_exact(tmp_path):
    path = tmp_path / "map.tsv"
    path.write_text("# source\tcanonical\nCtgf\tmine\nGad1\t\nOdd-Name\tGAD2\n")
    genes = map_symbols(["Ctgf", "Gad1", "Gad2", "Odd-Name"], organism="mouse", gene_map=path)
    assert genes.canonical == ("MINE", "", "", "GAD2")
    assert genes.how == ("alias", "unmapped", "collision", "alias")


def test_user_table_can_be_written_by_a_spreadsheet(tmp_path):
    path = tmp_path / "map.tsv"
    path.write_bytes(b"\xef\xbb\xbfOdd\tGAD1\r\n\r\n")
    assert one("Odd", gene_map=path) == ("GAD1", "alias")


def test_user_table_with_other_columns_is_refused_with_its_line(tmp_path):
    path = tmp_path / "map.tsv"
    path.write_text("a\tb\nc\n")
    with pytest.raises(InputError, match=r"line 2 of .* 1 columns"):
        one("Gad1", gene_map=path)


def test_missing_user_table_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read the gene map"):
        one("Gad1", gene_map=tmp_path / "absent.tsv")


def test_unknown_organism_is_refused_and_the_known_ones_are_named():
    with pytest.raises(InputError, match="choose from mouse, human"):
        map_symbols(["Gad1"], organism="rat")


def test_report_counts_every_outcome_and_names_what_is_not_plain():
    symbols = ["Gad1", "Ctgf", "Car4", "H2-D1", "Blank-1", "Ccn2", "ENSMUSG00000000001"]
    report = map_symbols(symbols, organism="mouse").report()
    assert report["n_source"] == 7
    assert report["n_mapped"] == 4
    assert tuple(report["counts"]) == OUTCOMES
    assert report["counts"] == {
        "exact": 2,
        "alias": 0,
        "ortholog": 1,
        "upper": 1,
        "control": 1,
        "collision": 1,
        "unmapped": 1,
    }
    assert report["not_exact"] == [["Car4", "CA4", "ortholog"], ["H2-D1", "H2-D1", "upper"]]
    assert report["dropped"] == [["Ctgf", "collision"], ["Blank-1", "control"], ["ENSMUSG00000000001", "unmapped"]]


def test_no_canonical_symbol_of_ours_is_an_earlier_symbol_of_another_gene():
    earlier = {row[0] for row in table("aliases.tsv")}
    targets = {row[1] for row in table("aliases.tsv")} | {row[1] for row in table("mouse.tsv")}
    assert not earlier & targets


@pytest.mark.parametrize("name", ["aliases.tsv", "mouse.tsv"])
def test_table_has_two_columns_no_repeat_and_plain_symbols(name):
    rows = table(name)
    assert all(len(row) == 2 for row in rows)
    assert len({row[0].upper() for row in rows}) == len(rows) >= 150
    assert all(re.fullmatch(r"[A-Z0-9-]*", row[1]) for row in rows)


def test_tables_digest_is_a_key():
    assert re.fullmatch("[0-9a-f]{32}", tables_digest())


@settings(deadline=None, max_examples=25)
@given(
    symbols=st.lists(st.sampled_from(["Gad1", "GAD1", "Ctgf", "Ccn2", "Car4", "CA4", "Blank1", "H2-D1", ""])),
    organism=st.sampled_from(["mouse", "human"]),
)
def test_canonical_symbols_are_unique_and_map_to_themselves(symbols, organism):
    genes = map_symbols(symbols, organism=organism)
    mapped = [symbol for symbol in genes.canonical if symbol]
    assert len(set(mapped)) == len(mapped)
    assert map_symbols(mapped, organism="human").canonical == tuple(mapped)

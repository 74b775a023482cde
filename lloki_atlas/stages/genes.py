"""Gene symbols: from what a panel calls its genes to canonical ones (upper-case current human symbols).

Panels of different years and species name one gene differently: Ctgf and Ccn2, Car4 and CA4, Fam19a1 and TAFA1.
Two small tables of our own hold what upper-casing alone would miss; a user's table wins over both.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from lloki_atlas.config import digest
from lloki_atlas.errors import InputError

ORGANISMS = ("mouse", "human")
OUTCOMES = ("exact", "alias", "ortholog", "upper", "control", "collision", "unmapped")

_CONTROLS = re.compile(
    r"blank|neg(control|prb|ative)|system_?control|unassigned|deprecated_?codeword|false_?code"
    r"|intergenic_?region|antisense_|erna\d+$",
    re.IGNORECASE,
)
_IDENTIFIERS = re.compile(r"ENS[A-Z]*[GT]\d{6,}|\d+$", re.IGNORECASE)
# mouse names of large families and predicted genes: a human gene of that upper-cased name is another gene, or none
_NAMELESS = re.compile(r"gm\d+|h2-|olfr\d+|vmn\dr|[0-9a-z]+rik$", re.IGNORECASE)
_MISSING = ("", "nan", "none", "na")
# who keeps a canonical symbol that several source symbols claim
_RANK = {"user": 0, "exact": 1, "alias": 2, "ortholog": 3, "upper": 4}


@dataclass(frozen=True)
class GeneMap:
    """Source symbols, their canonical ones ("" for none), and how each was found; three tuples of one length.

    `exact`: the symbol itself, case aside. `alias`: an earlier symbol (or the user's table). `ortholog`: a mouse
    gene whose human namesake is spelt differently. `upper`: upper-cased, with no single human namesake known.
    `control`, `collision` (another source symbol holds the canonical one) and `unmapped` have none.
    """

    source: tuple[str, ...]
    canonical: tuple[str, ...]
    how: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.source) == len(self.canonical) == len(self.how):
            raise InputError("source, canonical and how of a gene map differ in length: give one entry per gene")
        mapped = [symbol for symbol in self.canonical if symbol]
        if len(set(mapped)) != len(mapped):
            raise InputError("a gene map has one canonical symbol twice: mark all but one as collision")

    @property
    def symbols(self) -> tuple[str, ...]:
        """Canonical symbols that were found, sorted."""
        return tuple(sorted(symbol for symbol in self.canonical if symbol))

    def report(self) -> dict[str, Any]:
        """Return counts and the genes worth a look (JSON-like).

        Returns
        -------
        `n_source`, `n_mapped`; `counts` per outcome; `not_exact`, a list of [source, canonical, how]; and
        `dropped`, a list of [source, how].
        """
        counts = Counter(self.how)
        genes = list(zip(self.source, self.canonical, self.how, strict=True))
        return {
            "n_source": len(genes),
            "n_mapped": sum(1 for _, canonical, _ in genes if canonical),
            "counts": {outcome: counts[outcome] for outcome in OUTCOMES},
            "not_exact": [[source, canonical, how] for source, canonical, how in genes if canonical and how != "exact"],
            "dropped": [[source, how] for source, canonical, how in genes if not canonical],
        }


def map_symbols(symbols: Sequence[str], *, organism: str, gene_map: str | Path | None = None) -> GeneMap:
    """Map the symbols of a panel to canonical ones.

    Parameters
    ----------
    symbols
        As published.
    organism
        `mouse` or `human`.
    gene_map
        Tab-separated file, source symbol and canonical symbol (empty to drop the gene); it wins over our tables.

    Returns
    -------
    GeneMap
        In the order of `symbols`. Of several source symbols with one canonical symbol the most direct one keeps it
        (user's table, exact, alias, ortholog, upper; then the first) and the others are collisions.

    Raises
    ------
    InputError
        If the organism is another one, or `gene_map` cannot be read.
    """
    check_organism(organism)
    user = _read_user_table(Path(gene_map)) if gene_map is not None else {}
    source = tuple(str(symbol) for symbol in symbols)
    found = [_find(symbol.strip(), organism=organism, user=user) for symbol in source]
    keeper: dict[str, int] = {}
    for row in sorted(range(len(found)), key=lambda i: (_RANK.get(found[i][1], len(_RANK)), i)):
        if found[row][0]:
            keeper.setdefault(found[row][0], row)
    canonical, how = [], []
    for row, (symbol, outcome) in enumerate(found):
        kept = not symbol or keeper[symbol] == row
        canonical.append(symbol if kept else "")
        how.append({"user": "alias"}.get(outcome, outcome) if kept else "collision")
    return GeneMap(source, tuple(canonical), tuple(how))


def check_organism(organism: str) -> None:
    """Refuse an organism whose symbols cannot be mapped."""
    if organism not in ORGANISMS:
        raise InputError(f"unknown organism {organism!r}: choose from {', '.join(ORGANISMS)}")


@cache
def tables_digest() -> str:
    """Digest of the built-in tables, part of the key of every slice that was mapped with them."""
    return digest({"aliases": _aliases(), "mouse": _mouse()})


def _find(symbol: str, *, organism: str, user: dict[str, str]) -> tuple[str, str]:
    """Canonical symbol and outcome of one source symbol; the outcome `user` is the user's table."""
    upper = symbol.upper()
    if symbol in user:
        return (user[symbol], "user") if user[symbol] else ("", "unmapped")
    if symbol.lower() in _MISSING or _IDENTIFIERS.match(symbol):
        return "", "unmapped"
    if _CONTROLS.match(symbol):
        return "", "control"
    if organism == "mouse" and upper in _mouse():
        human = _mouse()[upper]
        return (human, "ortholog") if human else (upper, "upper")
    if upper in _aliases():
        return _aliases()[upper], "alias"
    if organism == "mouse" and _NAMELESS.match(symbol):
        return upper, "upper"
    return upper, "exact"


@cache
def _aliases() -> dict[str, str]:
    return _packaged("aliases.tsv")


@cache
def _mouse() -> dict[str, str]:
    return {mouse.upper(): human for mouse, human in _packaged("mouse.tsv").items()}


def _packaged(name: str) -> dict[str, str]:
    text = resources.files("lloki_atlas.stages").joinpath("gene_tables", name).read_text(encoding="utf-8")
    rows = list(csv.reader(text.splitlines(), delimiter="\t"))
    return {row[0]: row[1] for row in rows[1:]}


def _read_user_table(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the gene map {path}: give a tab-separated text file ({error})") from error
    table: dict[str, str] = {}
    for number, row in enumerate(csv.reader(text.splitlines(), delimiter="\t"), start=1):
        if not row or row[0].startswith("#"):
            continue
        if len(row) != 2:
            raise InputError(f"line {number} of {path} has {len(row)} columns: give source symbol, tab, canonical one")
        table[row[0].strip()] = row[1].strip().upper()
    return table

"""Ranges of cells that are searched against each other, every pair of them once and the work shared evenly."""

from __future__ import annotations

from lloki_atlas.kernels.products import BLOCK


def search_ranges(n_cells: int, search_cells: int) -> list[list[int]]:
    """Ranges [start, stop) of nearly equal size, at most `search_cells` (rounded up to a block) each."""
    count = -(-n_cells // search_cells)
    size = -(-n_cells // count // BLOCK) * BLOCK
    return [[start, min(start + size, n_cells)] for start in range(0, n_cells, size)]


def partners(own: int, n_ranges: int) -> list[int]:
    """Ranges that `own` is searched against: the half that follows it on a circle, so that each pair meets once."""
    half = n_ranges // 2
    steps = range(1, half + 1 if n_ranges % 2 or own < half else half)
    return [(own + step) % n_ranges for step in steps]

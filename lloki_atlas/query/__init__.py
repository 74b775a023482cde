"""Questions to a committed version of an atlas: select cells, find the nearest ones."""

from lloki_atlas.query.nearest import NearestCells, nearest_cells
from lloki_atlas.query.select import CellSelection, select_cells

__all__ = ["CellSelection", "NearestCells", "nearest_cells", "select_cells"]

"""The simulated tissue: a folded, cortex-like sheet of six layers over white matter, and the cells on a cut of it.

Depth runs from 0 at the pia to 1 at the bottom of the white matter. The sheet has one thickness in every cut; more
cells make it longer, then folded (gyri back to back), so that density and layers stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# fine type, coarse type, relative abundance in L1 L2 L3 L4 L5 L6 and white matter
_COMPOSITION = (
    ("L2/3 IT", "Excitatory", (0.02, 0.50, 0.50, 0.06, 0.01, 0.00, 0.00)),
    ("L4 IT", "Excitatory", (0.00, 0.02, 0.08, 0.55, 0.06, 0.00, 0.00)),
    ("L5 IT", "Excitatory", (0.00, 0.00, 0.01, 0.06, 0.46, 0.06, 0.00)),
    ("L6 CT", "Excitatory", (0.00, 0.00, 0.00, 0.01, 0.06, 0.46, 0.02)),
    ("L6b", "Excitatory", (0.00, 0.00, 0.00, 0.00, 0.00, 0.04, 0.09)),
    ("Pvalb", "Inhibitory", (0.01, 0.03, 0.05, 0.06, 0.07, 0.04, 0.00)),
    ("Sst", "Inhibitory", (0.01, 0.02, 0.03, 0.04, 0.06, 0.05, 0.005)),
    ("Vip", "Inhibitory", (0.03, 0.06, 0.05, 0.03, 0.02, 0.01, 0.002)),
    ("Lamp5", "Inhibitory", (0.15, 0.03, 0.02, 0.015, 0.015, 0.02, 0.002)),
    ("Astro", "Astrocyte", (0.35, 0.11, 0.08, 0.07, 0.08, 0.10, 0.16)),
    ("Oligo", "Oligodendrocyte", (0.04, 0.02, 0.03, 0.05, 0.08, 0.12, 0.58)),
    ("OPC", "OPC", (0.08, 0.04, 0.04, 0.035, 0.04, 0.04, 0.06)),
    ("Micro", "Microglia", (0.09, 0.05, 0.05, 0.045, 0.045, 0.05, 0.06)),
    ("Endo", "Endothelial", (0.12, 0.08, 0.08, 0.08, 0.07, 0.07, 0.05)),
    ("Mural", "Mural", (0.10, 0.03, 0.03, 0.03, 0.025, 0.025, 0.02)),
)
CELL_TYPES = tuple(fine for fine, _, _ in _COMPOSITION)
COARSE_TYPES = tuple(sorted({coarse for _, coarse, _ in _COMPOSITION}))
COARSE_OF_TYPE = np.array([COARSE_TYPES.index(coarse) for _, coarse, _ in _COMPOSITION])
LAYERS = ("L1", "L2", "L3", "L4", "L5", "L6", "WM")

_LAYER_TOPS = np.array([0.0, 0.10, 0.19, 0.34, 0.47, 0.67, 0.88])
_LAYER_DENSITY = np.array([0.55, 1.05, 1.05, 1.25, 0.95, 1.05, 1.10])
_WEIGHTS = np.array([weights for _, _, weights in _COMPOSITION]).T  # (layers, types)
_VASCULAR = np.isin(CELL_TYPES, ("Endo", "Mural"))
_LAYER_BLUR = 0.010  # in units of depth
_THICKNESS_UM = 1400.0
_VESSEL_SPACING_UM = 140.0
_VESSEL_REACH_UM = 10.0
_DEPTH_GRID = np.linspace(0.0, 1.0, 513)


@dataclass(frozen=True)
class Tissue:
    """One sheet of tissue: thickness and folds, and the phases of its bends and vessels."""

    thickness_um: float
    n_folds: int
    phases: tuple[float, ...]


@dataclass(frozen=True)
class Cut:
    """One section through the tissue: how many cells, where it was cut, how it lies on the stage."""

    n_cells: int
    area_um2: float
    z_um: float
    start_um: float
    angle: float
    stage_um: tuple[float, float]


@dataclass(frozen=True)
class Cells:
    """Cells before their counts: type and layer as codes, depth in [0, 1], two smooth states, coordinates in µm."""

    cell_type: np.ndarray
    layer: np.ndarray
    depth: np.ndarray
    state: np.ndarray
    coordinates: np.ndarray | None

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self.cell_type.shape[0])


def make_tissue(n_cells: int, *, rng: np.random.Generator) -> Tissue:
    """Shape a sheet for cuts of about `n_cells` cells."""
    area = n_cells * 125.0
    # small cuts get a thinner sheet, so that they are a piece of cortex rather than a line of cells
    thickness = min(_THICKNESS_UM, 2.0 * float(np.sqrt(area)))
    n_folds = max(1, int(np.sqrt(area / 1.3) / thickness))
    return Tissue(thickness, n_folds, tuple(rng.uniform(0.0, 2.0 * np.pi, size=4)))


def make_cut(n_cells: int, *, area_um2: float, index: int, rng: np.random.Generator) -> Cut:
    """Place cut number `index`: 30 µm below the one before, shifted along the sheet, turned and moved on the stage."""
    stage = rng.uniform(500.0, 5000.0, size=2)
    return Cut(
        n_cells=n_cells,
        area_um2=area_um2,
        z_um=30.0 * index,
        start_um=float(rng.uniform(0.0, 300.0)),
        angle=float(rng.uniform(-0.6, 0.6)),
        stage_um=(float(stage[0]), float(stage[1])),
    )


def cells_of_cut(tissue: Tissue, cut: Cut, *, rows: np.ndarray, rng: np.random.Generator) -> Cells:
    """Lay out some cells of a cut, `rows` of its 0 to n_cells - 1.

    Cells fill the cut column by column on a jittered lattice: one block of cells is one strip of the section, as
    a microscope would image it, and no two cells are at one place.

    Returns
    -------
    Cells
        With coordinates (len(rows), 2) float32 in micrometres.
    """
    height = tissue.thickness_um * tissue.n_folds
    width = cut.n_cells * cut.area_um2 / height
    spacing = float(np.sqrt(cut.area_um2))
    n_column = max(1, round(height / spacing))
    jitter = rng.uniform(-0.42, 0.42, size=(rows.size, 2))
    along = cut.start_um + (rows + 0.5) / cut.n_cells * width + jitter[:, 0] * spacing
    across = (rows % n_column + 0.5 + jitter[:, 1]) / n_column * tissue.n_folds
    fold = np.floor(across)
    flipped = fold % 2 == 1
    quantile = np.where(flipped, 1.0 - (across - fold), across - fold)
    sheet_depth = np.interp(quantile, *_depth_quantiles())
    depth = _laminar_depth(tissue, sheet_depth, along, cut.z_um)
    cell_type, layer = _draw_types(depth, _vessel_distance(tissue, along, sheet_depth, cut.z_um), rng)
    height_um = (fold + np.where(flipped, 1.0 - sheet_depth, sheet_depth)) * tissue.thickness_um
    height_um += 0.03 * tissue.thickness_um * np.sin(along / 260.0 + tissue.phases[0])
    areal = np.sin(along / 700.0 + cut.z_um / 900.0 + tissue.phases[1])
    return Cells(
        cell_type=cell_type,
        layer=layer,
        depth=depth.astype(np.float32),
        state=np.stack([2.0 * depth - 1.0, areal], axis=1),
        coordinates=_on_stage(cut, along, height_um, centre=(cut.start_um + width / 2, height / 2)),
    )


def dissociated_cells(n_cells: int, *, rng: np.random.Generator) -> Cells:
    """Draw cells as a dissociation does: no coordinates, neurons enriched, vessels and white matter thinned out."""
    depth = np.interp(rng.uniform(0.0, 0.94, size=n_cells), *_depth_quantiles())
    recovery = np.where(np.isin(CELL_TYPES, ("Pvalb", "Sst", "Vip", "Lamp5")), 1.8, 1.0)
    recovery[_VASCULAR] = 0.6
    recovery[[CELL_TYPES.index(name) for name in ("Astro", "Oligo")]] = 0.6
    weights = _composition(depth) * recovery
    return Cells(
        cell_type=_pick(weights, rng),
        layer=_layer_of(depth),
        depth=depth.astype(np.float32),
        state=np.stack([2.0 * depth - 1.0, rng.uniform(-1.0, 1.0, size=n_cells)], axis=1),
        coordinates=None,
    )


def composition_by_depth(n_bins: int) -> np.ndarray:
    """Return the proportion of every type at the middle of `n_bins` depths, (n_bins, n_types), rows summing to 1."""
    return _composition((np.arange(n_bins) + 0.5) / n_bins)


def _composition(depth: np.ndarray) -> np.ndarray:
    """Mix the layers' proportions at each depth, layers fading into each other."""
    edge = 1.0 / (1.0 + np.exp(-(depth[:, None] - _LAYER_TOPS[None, 1:]) / _LAYER_BLUR))
    passed = np.hstack([np.ones((depth.size, 1)), edge, np.zeros((depth.size, 1))])
    membership = passed[:, :-1] - passed[:, 1:]
    # summed layer by layer instead of a BLAS product, whose last bit may depend on the machine's threads
    weights = sum(membership[:, [i]] * _WEIGHTS[i] for i in range(len(LAYERS)))
    return weights / np.sum(weights, axis=1, keepdims=True)


def _draw_types(depth: np.ndarray, vessel_um: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    weights = _composition(depth)
    near = np.exp(-((vessel_um / _VESSEL_REACH_UM) ** 2))
    weights[:, _VASCULAR] *= (0.4 + 6.0 * near)[:, None]
    return _pick(weights, rng), _layer_of(depth)


def _pick(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    cumulative = np.cumsum(weights, axis=1)
    draw = rng.uniform(size=weights.shape[0]) * cumulative[:, -1]
    picked = (draw[:, None] >= cumulative).sum(axis=1)
    return np.minimum(picked, weights.shape[1] - 1).astype(np.int8)


def _layer_of(depth: np.ndarray) -> np.ndarray:
    return (np.searchsorted(_LAYER_TOPS, depth, side="right") - 1).astype(np.int8)


def _depth_quantiles() -> tuple[np.ndarray, np.ndarray]:
    """Share of the cells above each depth, and the depths: the inverse puts more cells where layers are denser."""
    density = _LAYER_DENSITY[_layer_of(_DEPTH_GRID[:-1])]
    share = np.concatenate([[0.0], np.cumsum(density)])
    return share / share[-1], _DEPTH_GRID


def _laminar_depth(tissue: Tissue, sheet_depth: np.ndarray, along: np.ndarray, z_um: float) -> np.ndarray:
    """Let the layers swell and shrink along the sheet; the pia and the bottom stay where they are."""
    swell = 0.03 * np.sin(along / 180.0 + z_um / 120.0 + tissue.phases[2])
    return np.clip(sheet_depth + swell * 4.0 * sheet_depth * (1.0 - sheet_depth), 0.0, 1.0)


def _vessel_distance(tissue: Tissue, along: np.ndarray, depth: np.ndarray, z_um: float) -> np.ndarray:
    """Distance in µm to the nearest penetrating vessel; vessels wander with depth and from cut to cut."""
    distance = np.full(along.shape, np.inf)
    nearest = np.round(along / _VESSEL_SPACING_UM)
    for step in (-1, 0, 1):
        vessel = nearest + step
        wander = np.sin(2.4 * vessel + tissue.phases[3]) + 0.3 * np.sin(4.0 * depth + vessel + z_um / 60.0)
        distance = np.minimum(distance, np.abs(along - _VESSEL_SPACING_UM * (vessel + 0.3 * wander)))
    return distance


def _on_stage(cut: Cut, along: np.ndarray, height_um: np.ndarray, *, centre: tuple[float, float]) -> np.ndarray:
    cosine, sine = np.cos(cut.angle), np.sin(cut.angle)
    x, y = along - centre[0], height_um - centre[1]
    placed = np.stack([cosine * x - sine * y + cut.stage_um[0], sine * x + cosine * y + cut.stage_um[1]], axis=1)
    return placed.astype(np.float32)

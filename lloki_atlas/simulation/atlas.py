"""The embedded default data: seeded slices of four platforms over one tissue, their reference and a manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lloki_atlas.errors import InputError
from lloki_atlas.simulation.genes import Profiles, make_profiles
from lloki_atlas.simulation.platforms import (
    DISSOCIATED,
    PLATFORMS,
    Assay,
    Platform,
    draw_counts,
    make_assay,
    panel_symbols,
)
from lloki_atlas.simulation.tissue import (
    CELL_TYPES,
    COARSE_OF_TYPE,
    COARSE_TYPES,
    LAYERS,
    Cells,
    Tissue,
    cells_of_cut,
    dissociated_cells,
    make_cut,
    make_tissue,
)
from lloki_atlas.simulation.write import Block, write_h5ad, write_text

BLOCK_CELLS = 4096
_N_PROBE_CELLS = 400
# what a stream of random numbers is for; the first part of its key
_TISSUE, _PROFILES, _PLATFORM, _CUT, _PROBE, _ASSAY, _LAYOUT, _COUNTS = range(8)
_REFERENCE_INDEX = 2**31  # no slice has this number

Progress = Callable[[int, int], None]


def simulate(
    folder: str | Path,
    *,
    n_cells: int = 8000,
    n_slices: int = 4,
    random_state: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write a small atlas to be built: slices of several platforms, an scRNA-seq reference, and the manifest.

    The tissue is cortex-like. Slice s is measured with platform s modulo 4, each on another cut of the same tissue.
    Cells are made and written in blocks keyed by (random_state, slice, block): memory does not grow with `n_cells`,
    and equal arguments give equal contents.

    Parameters
    ----------
    folder
        Where to write `<slice_id>.h5ad`, `reference.h5ad` and `atlas.toml`; made if it is missing.
    n_cells
        Cells of all slices together, split as evenly as can be.
    n_slices
        Number of slices.
    random_state
        Seed, not negative.
    progress
        Called with (cells written, cells in all, the reference included) after every block.

    Returns
    -------
    Path
        The manifest, `atlas.toml`.

    Raises
    ------
    InputError
        If there are fewer than ten cells a slice, no slice, a negative seed, or `folder` is a file.
    """
    if n_slices < 1:
        raise InputError(f"n_slices is {n_slices}: simulate at least one slice")
    if n_cells < 10 * n_slices:
        raise InputError(f"n_cells is {n_cells} for {n_slices} slices: give at least ten cells a slice")
    if random_state < 0:
        raise InputError(f"random_state is {random_state}: it has to be zero or more")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: name a folder to write the simulated slices to")
    folder.mkdir(parents=True, exist_ok=True)

    sizes = [n_cells // n_slices + (s < n_cells % n_slices) for s in range(n_slices)]
    n_reference = min(3000, max(600, n_cells // 2))
    report = _counter(progress, total=n_cells + n_reference)
    tissue = make_tissue(n_cells // n_slices, rng=_rng(random_state, _TISSUE))
    profiles = make_profiles(rng=_rng(random_state, _PROFILES))
    slices = []
    for s, size in enumerate(sizes):
        platform = PLATFORMS[s % len(PLATFORMS)]
        slice_id = f"{platform.slug}_{s // len(PLATFORMS) + 1}"
        _write_slice(
            folder / f"{slice_id}.h5ad",
            slice_id,
            platform=platform,
            tissue=tissue,
            profiles=profiles,
            index=s,
            n_cells=size,
            random_state=random_state,
            report=report,
        )
        slices.append((slice_id, platform.name))
    _write_reference(folder / "reference.h5ad", profiles, n_cells=n_reference, random_state=random_state, report=report)
    manifest = folder / "atlas.toml"
    write_text(manifest, _manifest(slices))
    return manifest


def _write_slice(
    path: Path,
    slice_id: str,
    *,
    platform: Platform,
    tissue: Tissue,
    profiles: Profiles,
    index: int,
    n_cells: int,
    random_state: int,
    report: Callable[[int], None],
) -> None:
    def rng(purpose: int, block: int = 0) -> np.random.Generator:
        return _rng(random_state, purpose, index, block)

    cut = make_cut(n_cells, area_um2=platform.area_um2, index=index, rng=rng(_CUT))
    probed = rng(_PROBE).integers(0, n_cells, size=_N_PROBE_CELLS)
    assay = make_assay(
        platform,
        profiles,
        probe=cells_of_cut(tissue, cut, rows=probed, rng=rng(_PROBE, 1)),
        platform_rng=_rng(random_state, _PLATFORM, PLATFORMS.index(platform)),
        slice_rng=rng(_ASSAY),
    )

    def lay_out(rows: np.ndarray, block: int) -> Cells:
        return cells_of_cut(tissue, cut, rows=rows, rng=rng(_LAYOUT, block))

    write_h5ad(
        path,
        _blocks(assay, slice_id, n_cells=n_cells, lay_out=lay_out, rng=rng, report=report),
        n_cells=n_cells,
        symbols=panel_symbols(platform),
        categories={**_categories(slice_id, platform.name), "layer": LAYERS},
        numbers=("depth",),
        source={
            "unit": "micrometer",
            "um_per_unit": 1.0,
            "species": "mouse",
            "tissue": "simulated cortex with white matter",
            "notes": f"simulated, random_state {random_state}; depth is 0 at the pia and 1 below the white matter",
        },
    )


def _write_reference(
    path: Path, profiles: Profiles, *, n_cells: int, random_state: int, report: Callable[[int], None]
) -> None:
    def rng(purpose: int, block: int = 0) -> np.random.Generator:
        return _rng(random_state, purpose, _REFERENCE_INDEX, block)

    assay = make_assay(
        DISSOCIATED,
        profiles,
        probe=dissociated_cells(_N_PROBE_CELLS, rng=rng(_PROBE)),
        platform_rng=_rng(random_state, _PLATFORM, len(PLATFORMS)),
        slice_rng=rng(_ASSAY),
    )

    def lay_out(rows: np.ndarray, block: int) -> Cells:
        return dissociated_cells(rows.size, rng=rng(_LAYOUT, block))

    write_h5ad(
        path,
        _blocks(assay, "reference", n_cells=n_cells, lay_out=lay_out, rng=rng, report=report),
        n_cells=n_cells,
        symbols=assay.symbols,
        categories=_categories("reference", DISSOCIATED.name),
        spatial=False,
        source={"unit": "none", "species": "mouse", "tissue": "simulated cortex with white matter"},
    )


def _categories(slice_id: str, technology: str) -> dict[str, tuple[str, ...]]:
    return {
        "slice": (slice_id,),
        "technology": (technology,),
        "cell_type": CELL_TYPES,
        "cell_type_coarse": COARSE_TYPES,
    }


def _blocks(
    assay: Assay,
    slice_id: str,
    *,
    n_cells: int,
    lay_out: Callable[[np.ndarray, int], Cells],
    rng: Callable[[int, int], np.random.Generator],
    report: Callable[[int], None],
) -> Iterator[Block]:
    """Make the cells of a file, each block from streams of its own."""
    for block, start in enumerate(range(0, n_cells, BLOCK_CELLS)):
        rows = np.arange(start, min(start + BLOCK_CELLS, n_cells))
        yield _block(assay, lay_out(rows, block), slice_id, start=start, rng=rng(_COUNTS, block))
        report(rows.size)


def _block(assay: Assay, cells: Cells, slice_id: str, *, start: int, rng: np.random.Generator) -> Block:
    zeros = np.zeros(cells.n_cells, dtype=np.int8)
    columns = {
        "slice": zeros,
        "technology": zeros,
        "cell_type": cells.cell_type,
        "cell_type_coarse": COARSE_OF_TYPE[cells.cell_type].astype(np.int8),
    }
    if cells.coordinates is not None:  # dissociated cells have lost their place
        columns |= {"layer": cells.layer, "depth": cells.depth}
    return Block(
        counts=draw_counts(assay, cells, rng=rng),
        names=[f"{slice_id}_{start + i:07d}" for i in range(cells.n_cells)],
        columns=columns,
        coordinates=cells.coordinates,
    )


def _manifest(slices: list[tuple[str, str]]) -> str:
    head = """\
[atlas]
name = "simulated"
data = "."

[reference]
source = "reference.h5ad"
organism = "mouse"
label_key = "cell_type_coarse"

[settings.embedder]
name = "reference"
"""
    parts = [
        f"""
[[slices]]
source = {json.dumps(slice_id + ".h5ad")}
slice_id = {json.dumps(slice_id)}
technology = {json.dumps(technology)}
organism = "mouse"
coordinate_unit = "micrometer"
label_key = "cell_type_coarse"
"""
        for slice_id, technology in slices
    ]
    return head + "".join(parts)


def _counter(progress: Progress | None, *, total: int) -> Callable[[int], None]:
    done = 0

    def report(n_cells: int) -> None:
        nonlocal done
        done += n_cells
        if progress is not None:
            progress(done, total)

    return report


def _rng(random_state: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(random_state, spawn_key=key))

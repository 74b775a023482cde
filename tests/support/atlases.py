"""A tiny simulated atlas: its sources, a catalog with two slices ingested, and one that ran to the end.

The folders that the fixtures give are shared by all tests: copy them (`copied`) where a test changes something.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lloki_atlas.config import AtlasConfig, AutoencoderConfig, PropagationConfig, TileConfig, to_dict
from lloki_atlas.engine.plan import Outcome, Plan, run_task
from lloki_atlas.simulation import simulate
from lloki_atlas.stages.create import create_catalog
from lloki_atlas.stages.ingest import ingest
from lloki_atlas.stages.lineage import atlas_config
from lloki_atlas.stages.pipeline import run
from lloki_atlas.stages.reference import fit_reference
from lloki_atlas.store.arrays import read_arrays
from lloki_atlas.store.catalog import Catalog, commit, open_catalog
from lloki_atlas.store.records import Change
from lloki_atlas.store.references import ReferenceProfile
from lloki_atlas.store.slices import SliceStore

# slice id -> technology, in the order of the simulator; the last two have the panels of the first two
TECHNOLOGIES = {
    "simfish_1": "SimFISH",
    "simmap_1": "SimMAP",
    "simfish_plus_1": "SimFISH-plus",
    "simish_1": "SimISH",
    "simfish_2": "SimFISH",
    "simmap_2": "SimMAP",
}
N_CELLS = 60
SLICES = ("simfish_1", "simmap_1")
CONFIG = AtlasConfig(
    tile=TileConfig(tile_cells=32),
    propagation=PropagationConfig(n_neighbors=8, n_components=5, max_iterations=10, n_bandwidth_pairs=200),
    autoencoder=AutoencoderConfig(n_epochs=2, chunk_cells=100, n_neighbors_mutual=5, n_neighbors_conservation=5),
)


@cache
def make_sources(folder: Path) -> Path:
    """Simulate six slices and a reference; the folder that holds them."""
    return simulate(folder, n_cells=len(TECHNOLOGIES) * N_CELLS, n_slices=len(TECHNOLOGIES)).parent


@cache
def reference_profile(folder: Path) -> ReferenceProfile:
    """The fitted reference of simulated sources."""
    return fit_reference(folder / "reference.h5ad", organism="mouse", label_key="cell_type_coarse")


def add_slice(catalog: Catalog, source: Any, slice_id: str, **options: Any) -> Catalog:
    """Ingest one slice; `source` is the folder of the sources, or the source itself."""
    given = source / f"{slice_id}.h5ad" if isinstance(source, Path) and source.is_dir() else source
    settings = {
        "technology": TECHNOLOGIES.get(slice_id, "SimFISH"),
        "organism": "mouse",
        "coordinate_unit": "micrometer",
        "label_key": "cell_type_coarse",
        **options,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ingest(catalog, given, slice_id=slice_id, **settings)


def new_catalog(
    root: Path, sources: Path, *, config: AtlasConfig = CONFIG, slices: tuple[str, ...] = SLICES
) -> Catalog:
    """Create a catalog of simulated sources and ingest slices; nothing is run."""
    catalog = create_catalog(root, reference=reference_profile(sources), config=config)
    for slice_id in slices:
        catalog = add_slice(catalog, sources, slice_id)
    return catalog


def copied(root: Path, destination: Path) -> Catalog:
    """A catalog of the test's own, open for commits."""
    shutil.copytree(root, destination)
    return open_catalog(destination, mode="r+")


def with_settings(catalog: Catalog, section: str, **values: Any) -> Catalog:
    """Commit other settings of one section."""
    config = atlas_config(catalog)
    changed = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
    return commit(catalog, Change(config=to_dict(changed)), message="settings changed by a test")


def run_here(plan: Plan) -> Any:
    """Run a plan one task after the other in this process, without Dask."""
    done = frozenset(run_task(task) for task in plan.tasks)
    return plan.commit(Outcome(done, {}))


def embedding(catalog: Catalog, slice_id: str, name: str = "X_fp") -> np.ndarray:
    """Stored embedding of a slice: `X_fp` or `X_lloki`."""
    key = catalog.slice(slice_id).objects["embed" if name == "X_fp" else "integrate"]
    return read_arrays(catalog.path("embeddings", key), [name])[name]


def all_bytes(catalog: Catalog) -> dict[tuple[str, str], bytes]:
    """Bytes of every stored embedding."""
    return {
        (slice_id, name): embedding(catalog, slice_id, name).tobytes()
        for slice_id in catalog.state.slices
        for name in ("X_fp", "X_lloki")
    }


def by_cell(catalog: Catalog, slice_id: str, name: str) -> dict[str, bytes]:
    """Bytes of every cell's stored row, by the cell's name."""
    store = SliceStore(catalog.path("slices", catalog.slice(slice_id).objects["ingest"]))
    rows = embedding(catalog, slice_id, name)
    return {str(cell): row.tobytes() for cell, row in zip(store.obs([]).index, rows, strict=True)}


def stages(plan: Plan) -> dict[str, int]:
    """Number of tasks of each stage of a plan."""
    return {stage: part["tasks"] for stage, part in plan.summary()["stages"].items()}


def settings_text(config: AtlasConfig = CONFIG, **changed: Any) -> str:
    """Settings as TOML; `changed` holds other values by section."""
    values = to_dict(config)
    for section, part in changed.items():
        values[section] = {**values[section], **part}
    lines = []
    for section, part in values.items():
        lines.append(f"[settings.{section}]")
        lines += [f"{name} = {json.dumps(value)}" for name, value in part.items() if value is not None]
    return "\n".join(lines) + "\n"


def slice_text(source: str, **options: Any) -> str:
    """One `[[slices]]` of a manifest."""
    values = {
        "source": source,
        "technology": TECHNOLOGIES.get(Path(source).stem, "SimFISH"),
        "organism": "mouse",
        "coordinate_unit": "micrometer",
        "label_key": "cell_type_coarse",
        **options,
    }
    return "[[slices]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def write_manifest(
    path: Path, sources: Path, *slices: str, reference: str = "reference.h5ad", settings: str | None = None
) -> Path:
    """Write the manifest of a small atlas; of the two usual slices unless others are given."""
    parts = [
        f'[atlas]\nname = "small"\ndata = {json.dumps(str(sources))}\n',
        f'[reference]\nsource = "{reference}"\norganism = "mouse"\nlabel_key = "cell_type_coarse"\n',
        *(slices or [slice_text(f"{name}.h5ad") for name in SLICES]),
        settings_text() if settings is None else settings,
    ]
    path.write_text("\n".join(parts))
    return path


@pytest.fixture(scope="session")
def client() -> Iterator[Any]:
    """A Dask client whose only worker is a thread of this process."""
    from distributed import Client

    with Client(
        processes=False,
        n_workers=1,
        threads_per_worker=1,
        dashboard_address=":0",
        silence_logs=60,
        set_as_default=False,
    ) as made:
        yield made


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of simulated sources."""
    return make_sources(tmp_path_factory.getbasetemp() / "atlases" / "sources")


@pytest.fixture(scope="session")
def profile(sources: Path) -> ReferenceProfile:
    """The fitted simulated reference."""
    return reference_profile(sources)


@pytest.fixture(scope="session")
def ingested(sources: Path) -> Path:
    """Catalog with two slices of two panels, in two tiles each; nothing was run."""
    root = sources.parent / "ingested"
    if not root.exists():
        new_catalog(root, sources)
    return root


@pytest.fixture(scope="session")
def built(ingested: Path, client: Any) -> Path:
    """The same catalog after a run to the end."""
    root = ingested.parent / "built"
    if not root.exists():
        run(copied(ingested, root), client=client, progress=False)
    return root

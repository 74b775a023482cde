"""What is done to an atlas while it is killed: a few steps, each from what the one before it left.

Every step can be called again on what a killed call left; it says each version number as soon as it has it.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lloki_atlas.config import AtlasConfig, TileConfig, to_dict
from lloki_atlas.engine.plan import Plan
from lloki_atlas.errors import NotFoundError
from lloki_atlas.stages.adapt import adapt_autoencoder
from lloki_atlas.stages.create import create_catalog
from lloki_atlas.stages.lineage import atlas_config
from lloki_atlas.stages.pipeline import plan, train_autoencoder
from lloki_atlas.store.catalog import Catalog, commit, list_versions, open_catalog
from lloki_atlas.store.portable import import_version
from lloki_atlas.store.records import Change
from lloki_atlas.store.retention import gc
from lloki_atlas.store.revert import remove, rollback

from .atlases import CONFIG, SLICES, add_slice, reference_profile, run_here

Say = Callable[[int], None]

# the folder, beside the sources, of the atlas after each step
FINISHED = "undisturbed"
NEW, TECHNOLOGY = "simish_1", "SimISH"
# neighbours range against range, embeddings first and diffused after: the steps of a large slice
CHAINED = dataclasses.replace(
    CONFIG,
    tile=TileConfig(tile_cells=32, search_cells=40),
    propagation=dataclasses.replace(CONFIG.propagation, n_neighbors=7, diffuse="embedding"),
)


@dataclass(frozen=True)
class Step:
    """A step, the one that it follows ("" for the first), and one whose atlas it reads."""

    function: Callable[[Path, Path, Say], None]
    after: str
    reads: str = ""


def create(root: Path, sources: Path, say: Say) -> None:
    """Create the catalog."""
    try:
        catalog = open_catalog(root)
    except NotFoundError:
        catalog = create_catalog(root, reference=reference_profile(sources), config=CONFIG)
    say(catalog.version)


def ingest(root: Path, sources: Path, say: Say) -> None:
    """Ingest two slices, one commit each."""
    catalog = open_catalog(root, mode="r+")
    for slice_id in SLICES:
        catalog = add_slice(catalog, sources, slice_id)
        say(catalog.version)


def run(root: Path, sources: Path, say: Say) -> None:
    """Run every stage, and train the first autoencoder."""
    say(run_here(plan(open_catalog(root, mode="r+"))).version)


def train(root: Path, sources: Path, say: Say) -> None:
    """Train another autoencoder and encode everything with it."""
    say(train_autoencoder(open_catalog(root, mode="r+"), random_state=5).version)


def adapt(root: Path, sources: Path, say: Say) -> None:
    """Ingest a slice of another technology and adapt to it."""
    catalog = add_slice(open_catalog(root, mode="r+"), sources, NEW)
    say(catalog.version)
    say(adapt_autoencoder(catalog, technology=TECHNOLOGY).version)


def chain(root: Path, sources: Path, say: Say) -> None:
    """Change the settings, and run again what follows from them."""
    say(run_here(plan(_set(open_catalog(root, mode="r+"), CHAINED, say))).version)


def take(root: Path, sources: Path, say: Say) -> None:
    """Import everything from another catalog, the finished one."""
    say(import_version(open_catalog(root, mode="r+"), sources.parent / FINISHED / "run").version)


def revert(root: Path, sources: Path, say: Say) -> None:
    """Remove a slice, and take that back."""
    catalog = open_catalog(root, mode="r+")
    if SLICES[1] in catalog.state.slices:
        catalog = remove(catalog, SLICES[1])
        say(catalog.version)
    with_it = (number for number in list_versions(root) if SLICES[1] in open_catalog(root, version=number).state.slices)
    say(rollback(catalog, max(with_it)).version)


def collect(root: Path, sources: Path, say: Say) -> None:
    """Give up all versions but the newest, and remove what only they reach and what was left lying."""
    catalog = open_catalog(root, mode="r+")
    gc(catalog, keep_versions=1, grace_hours=0)
    say(open_catalog(root).version)


STEPS = {
    "create": Step(create, ""),
    "ingest": Step(ingest, "create"),
    "run": Step(run, "ingest"),
    "train": Step(train, "run"),
    "adapt": Step(adapt, "run"),
    "chain": Step(chain, "run"),
    "take": Step(take, "create", reads="run"),
    "revert": Step(revert, "run"),
    "collect": Step(collect, "train"),
}


def perform(name: str, root: Path, sources: Path, say: Say) -> None:
    """Take a step in this process, every task of it here and one after the other."""
    Plan.run = lambda plan, *_, **__: run_here(plan)  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        STEPS[name].function(root, sources, say)


def _set(catalog: Catalog, config: AtlasConfig, say: Say) -> Catalog:
    if atlas_config(catalog) != config:
        catalog = commit(catalog, Change(config=to_dict(config)), message="other settings")
    say(catalog.version)
    return catalog

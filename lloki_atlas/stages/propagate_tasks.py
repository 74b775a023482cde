"""LLOKI-FP of a slice as tasks: one for a slice of ordinary size, a chain of small ones for a large slice.

A large slice is searched range against range, every pair of ranges in one task, so that its neighbours are found on
many workers and no task holds the slice:

    space ─▶ search × ranges ─▶ fill ─▶ search × ranges ─▶ graph

What a step hands to the next lies in the staging area under the graph's key, and goes when the graph is there.
Both ways give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lloki_atlas.config import PropagationConfig, to_dict
from lloki_atlas.engine.outputs import Output
from lloki_atlas.engine.plan import Task
from lloki_atlas.errors import NotFoundError
from lloki_atlas.kernels.blocks import MemoryBlocks
from lloki_atlas.kernels.candidates import unpack_keys
from lloki_atlas.kernels.hashing import mix
from lloki_atlas.kernels.propagation import MakeBlocks
from lloki_atlas.kernels.rows import Rows
from lloki_atlas.kernels.self_search import Lists, merge_keys, search_between, search_within
from lloki_atlas.stages import memory
from lloki_atlas.stages.lineage import atlas_config
from lloki_atlas.stages.panels import (
    PanelCounts,
    panel_counts,
    reference_symbols,
    slice_random_key,
    streamed_memory,
)
from lloki_atlas.stages.propagate import FIRST, SECOND, Filled, Sparsities, fill, joined_graph, run_slice
from lloki_atlas.stages.ranges import partners, search_ranges
from lloki_atlas.stages.search import is_approximate
from lloki_atlas.stages.spaces import neighbor_rows
from lloki_atlas.store.arrays import ArraySpec, create_arrays, read_arrays, read_rows, write_arrays, write_rows
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.objects import is_complete
from lloki_atlas.store.places import place
from lloki_atlas.store.records import SliceRecord
from lloki_atlas.store.scratch import ScratchBlocks, scratch_folder
from lloki_atlas.store.slices import SliceStore

MODULE = "lloki_atlas.stages.propagate_tasks"
DIMS: dict[str, tuple[str, ...]] = {
    "indptr": ("cell_bound",),
    "indices": ("entry",),
    "weights": ("entry",),
    "budget": ("cell",),
    "target_nonzeros": ("cell",),
    "achieved_nonzeros": ("cell",),
    "n_iterations": ("one",),
    "relative_change": ("one",),
    "recall": ("graph",),
    "bandwidth_um": ("graph",),
}
_FILLED = ("budget", "target_nonzeros", "achieved_nonzeros", "n_iterations", "relative_change")


# ---- task bodies: paths and plain settings in, arrays out


def compute(inputs: dict[str, str], settings: dict[str, Any], in_memory: bool, scratch: str) -> dict[str, np.ndarray]:
    """All of LLOKI-FP in one task: the second graph and the sparsity report."""
    config = PropagationConfig(**settings)
    panel, coordinates, key = _slice(inputs, config, in_memory=in_memory)
    statistics = read_arrays(inputs["statistics"])
    with scratch_folder(scratch) as folder:
        sparsities = _sparsities(inputs)
        result = run_slice(
            panel,
            coordinates,
            own_histogram=sparsities.own_histogram,
            reference_histogram=sparsities.reference_histogram,
            reference_histogram_all=sparsities.reference_histogram_all,
            bandwidth_um=float(statistics["bandwidth_um"][0]),
            settings=config,
            key=key,
            technology=str(SliceStore(inputs["slice"]).metadata["technology"]),
            make_blocks=MemoryBlocks if in_memory else _blocks_in(folder),
        )
    return {
        "indptr": result.graph.indptr,
        "indices": result.graph.indices,
        "weights": result.graph.weights,
        **_filled_arrays(result.filled),
        "recall": np.array(result.recall),
        "bandwidth_um": np.array(result.bandwidth_um),
    }


def compute_space(inputs: dict[str, str], settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """Rows of the space of the first search."""
    config = PropagationConfig(**settings)
    panel, _, _ = _slice(inputs, config, in_memory=False)
    return {"rows": neighbor_rows(panel, config)}


def compute_search(
    inputs: dict[str, str], settings: dict[str, Any], rows: str, ranges: list[list[int]], own: int
) -> dict[str, np.ndarray]:
    """Neighbours among the cells of one range, and between them and those of its partners: lists of all of them.

    `rows` is the object that holds the space, "" for the counts of the slice.
    """
    config = PropagationConfig(**settings)
    k, mine = config.n_neighbors, (ranges[own][0], ranges[own][1])
    space = _rows_of(inputs, config, rows)
    if space is None:  # nothing was filled in
        return {"none": np.zeros(1, dtype=np.int8)}
    held = np.asarray(space[mine[0] : mine[1]])

    def read(start: int, stop: int) -> np.ndarray:
        if mine[0] <= start and stop <= mine[1]:
            return held[start - mine[0] : stop - mine[0]]
        return np.asarray(space[start:stop])

    n_dimensions = space.shape[1]
    lists = Lists.empty(*mine, k)
    search_within(read, mine, n_dimensions, lists, n_threads=1)
    found = {}
    for other in partners(own, len(ranges)):
        theirs = Lists.empty(ranges[other][0], ranges[other][1], k)
        search_between(read, mine, (theirs.start, theirs.stop), n_dimensions, (lists, theirs), n_threads=1)
        found[f"keys_{other}"] = theirs.keys.view(np.int64)
    return {**found, f"keys_{own}": lists.keys.view(np.int64)}


def compute_fill(
    staging: str, inputs: dict[str, str], settings: dict[str, Any], searches: list[str], ranges: list[list[int]],
    in_memory: bool, scratch: str,
) -> None:  # fmt: skip
    """The first graph, the budgets, propagation, and the space of the second search."""
    config = PropagationConfig(**settings)
    panel, coordinates, key = _slice(inputs, config, in_memory=in_memory)
    bandwidth = float(read_arrays(inputs["statistics"])["bandwidth_um"][0])
    first, sigma = joined_graph(
        _merged_indices(searches, ranges, config.n_neighbors),
        coordinates,
        bandwidth_um=bandwidth,
        settings=config,
        key=mix(key, FIRST),
    )
    with scratch_folder(scratch) as folder:
        filled = fill(
            first,
            panel,
            sparsities=_sparsities(inputs),
            settings=config,
            key=key,
            make_blocks=MemoryBlocks if in_memory else _blocks_in(folder),
        )
        del first
        write_arrays(
            staging,
            {**_filled_arrays(filled), "first_bandwidth_um": np.array([sigma])},
            dims={name: DIMS[name] for name in _FILLED},
        )
        if filled.budget.any():
            space = neighbor_rows(panel, config, propagated=filled.rows)
            _write_space(staging, space)


def compute_graph(
    inputs: dict[str, str], settings: dict[str, Any], filled: str, first: list[str], second: list[str],
    ranges: list[list[int]],
) -> dict[str, np.ndarray]:  # fmt: skip
    """The second graph, which is the first when nothing was filled in."""
    config = PropagationConfig(**settings)
    store = SliceStore(inputs["slice"])
    arrays = read_arrays(filled, [*_FILLED, "first_bandwidth_um"])
    same = not arrays["budget"].any()
    graph, sigma = joined_graph(
        _merged_indices(first if same else second, ranges, config.n_neighbors),
        store.coordinates(),
        bandwidth_um=float(read_arrays(inputs["statistics"])["bandwidth_um"][0]),
        settings=config,
        key=mix(slice_random_key(store.metadata["slice_id"], config), FIRST if same else SECOND),
    )
    return {
        "indptr": graph.indptr,
        "indices": graph.indices,
        "weights": graph.weights,
        **{name: arrays[name] for name in _FILLED},
        "recall": np.ones(2),
        "bandwidth_um": np.array([float(arrays["first_bandwidth_um"][0]), sigma]),
    }


def _slice(
    inputs: dict[str, str], config: PropagationConfig, *, in_memory: bool
) -> tuple[PanelCounts, np.ndarray, int]:
    store = SliceStore(inputs["slice"])
    panel = panel_counts(store, reference_symbols(inputs["reference"]), in_memory=in_memory)
    return panel, store.coordinates(), slice_random_key(store.metadata["slice_id"], config)


def _sparsities(inputs: dict[str, str]) -> Sparsities:
    panel = read_arrays(inputs["panel"], ["histogram", "histogram_all"])
    return Sparsities(
        read_arrays(inputs["statistics"], ["histogram"])["histogram"], panel["histogram"], panel["histogram_all"]
    )


def _blocks_in(folder: Path) -> MakeBlocks:
    return lambda n_cells, n_blocks, width, storage: ScratchBlocks(folder, n_cells, n_blocks, width, storage)


def _filled_arrays(filled: Filled) -> dict[str, np.ndarray]:
    return {
        "budget": filled.budget,
        "target_nonzeros": filled.target_nonzeros,
        "achieved_nonzeros": filled.achieved_nonzeros,
        "n_iterations": np.array([filled.n_iterations], dtype=np.int32),
        "relative_change": np.array([filled.relative_change]),
    }


def _rows_of(inputs: dict[str, str], config: PropagationConfig, rows: str) -> Any:
    if not rows:
        panel, _, _ = _slice(inputs, config, in_memory=False)
        return neighbor_rows(panel, config)
    if not (place(rows) / "rows").is_dir():
        if not is_complete(rows):
            raise NotFoundError(f"{rows} is not there: run the slice again")
        return None
    shape = (SliceStore(inputs["slice"]).n_cells, int(read_rows(rows, "rows", 0, 1).shape[1]))
    return Rows(shape, lambda start, stop: read_rows(rows, "rows", start, stop))


def _write_space(staging: str, space: Any) -> None:
    n, d = space.shape
    step = max(1, min(n, 4 * 2**20 // (4 * d)))
    create_arrays(staging, {"rows": ArraySpec((n, d), "float32", step, ("cell", "dimension"))})
    for start in range(0, n, step):
        write_rows(staging, "rows", start, np.asarray(space[start : min(start + step, n)]))


def _merged_indices(searches: list[str], ranges: list[list[int]], n_neighbors: int) -> np.ndarray:
    """Neighbours (n_cells, k) from what the searches of all pairs of ranges found."""
    indices = np.empty((ranges[-1][1], n_neighbors), dtype=np.int32)
    for own, (start, stop) in enumerate(ranges):
        holders = [i for i in range(len(ranges)) if i == own or own in partners(i, len(ranges))]
        parts = [read_arrays(searches[i], [f"keys_{own}"])[f"keys_{own}"].view(np.uint64) for i in holders]
        indices[start:stop] = unpack_keys(merge_keys(parts, n_neighbors))[0]
    return indices


# ---- the plan


def plan_stage(catalog: Catalog, record: SliceRecord, keys: dict[str, str]) -> list[Task]:
    """Tasks of one slice: a single one up to `search_cells` cells, else the chain."""
    config, tiles = atlas_config(catalog).propagation, atlas_config(catalog).tile
    store = SliceStore(catalog.path("slices", keys["ingest"]))
    needed = memory.slice_memory(record.n_cells, record.n_genes, store.n_counts, config)
    # the published forms of support and stripes treat a slice as one
    as_one = config.support != "frozen" or config.split != "none"
    steps = _Steps(catalog, record, keys, config, store, as_one or needed <= tiles.slice_memory_mb * 2**20)
    if as_one or record.n_cells <= tiles.search_cells or is_approximate(record.n_cells, config):
        return [steps.whole()]
    if is_complete(catalog.path("graphs", keys["propagate"])):  # what the steps hand on is no longer there
        return []
    return list(steps.chain(search_ranges(record.n_cells, tiles.search_cells)))


class _Steps:
    """The tasks of one slice, which share inputs, settings and places."""

    def __init__(
        self,
        catalog: Catalog,
        record: SliceRecord,
        keys: dict[str, str],
        config: PropagationConfig,
        store: SliceStore,
        in_memory: bool,
    ) -> None:
        self._record, self._config, self._store, self._in_memory = record, config, store, in_memory
        self._inputs = {
            "slice": str(catalog.path("slices", keys["ingest"])),
            "reference": str(catalog.path("references", str(catalog.state.reference))),
            "statistics": str(catalog.path("statistics", keys["tile"])),
            "panel": str(catalog.path("panels", keys["reference"])),
        }
        self._staging, self._final = (
            str(catalog.path("staging", keys["propagate"])),
            str(catalog.path("graphs", keys["propagate"])),
        )
        self._lineage = {"stage": "propagate", "statistics": keys["tile"]}

    def whole(self) -> Task:
        """LLOKI-FP in one task."""
        n_counts = self._store.n_counts
        needed = memory.slice_memory(
            self._record.n_cells, self._record.n_genes, n_counts, self._config, in_memory=self._in_memory
        )
        return self._final_task("compute", {"in_memory": self._in_memory, "scratch": self._staging}, needed)

    def chain(self, ranges: list[list[int]]) -> Iterator[Task]:
        """LLOKI-FP in small tasks."""
        n, genes, config = self._record.n_cells, self._record.n_genes, self._config
        scaled = config.graph_space == "scaled"
        width = config.n_components if scaled else genes
        size = max(stop - start for start, stop in ranges)
        space, filled = f"{self._staging}.space", f"{self._staging}.filled"
        counts = streamed_memory(self._store) + memory.slice_memory(0, genes, 0, config, in_memory=False)
        if scaled:
            needed = memory.space_memory(n, genes, config) + counts
            yield self._task("space", "compute_space", {}, Output(space, space + ".new", self._lineage), needed)
        n_partners = 1 + len(ranges) // 2
        searched = memory.search_memory(size * (1 + n_partners), size, width, config) + counts

        def searches(number: int, rows: str) -> Iterator[Task]:
            for own in range(len(ranges)):
                path = f"{self._staging}.search{number}-{own}-by-{size}"  # ranges may be others in another run
                arguments = {"rows": rows, "ranges": ranges, "own": own}
                output = Output(path, path + ".new", self._lineage)
                yield self._task(f"search{number}-{own}", "compute_search", arguments, output, searched, n_cells=0)

        first = list(searches(1, space if scaled else ""))
        yield from first
        first_paths = [task.output.path for task in first]
        steps = {"searches": first_paths, "ranges": ranges, "in_memory": self._in_memory, "scratch": self._staging}
        needed = memory.slice_memory(n, genes, self._store.n_counts, config, in_memory=self._in_memory)
        output = Output(filled, filled + ".new", self._lineage, folder=True)
        yield self._task("fill", "compute_fill", steps, output, needed, n_cells=0)
        second = list(searches(2, filled))
        yield from second
        steps = {
            "filled": filled,
            "first": first_paths,
            "second": [task.output.path for task in second],
            "ranges": ranges,
        }
        yield self._final_task("compute_graph", steps, memory.slice_memory(n, 0, 0, config))

    def _final_task(self, function: str, arguments: dict[str, Any], needed: int) -> Task:
        output = Output(
            self._final,
            self._staging,
            self._lineage,
            dims=DIMS,
            attributes={"slice_id": self._record.slice_id},
        )
        return self._task("", function, arguments, output, needed)

    def _task(
        self,
        step: str,
        function: str,
        arguments: dict[str, Any],
        output: Output,
        needed: int,
        n_cells: int | None = None,
    ) -> Task:
        name = f"propagate/{self._record.slice_id}"
        return Task(
            name=f"{name}/{step}" if step else name,
            stage="propagate",
            function=f"{MODULE}:{function}",
            arguments={"inputs": self._inputs, "settings": to_dict(self._config), **arguments},
            output=output,
            n_cells=self._record.n_cells if n_cells is None else n_cells,
            projected_memory=needed,
            slice_id=self._record.slice_id,
            until=self._final,
        )

"""LLOKI-FP as one task or as a chain of small ones, in memory or streamed, interrupted or not: the same bytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy.sparse import csr_matrix
from support.atlases import (
    CONFIG,
    add_slice,
    all_bytes,
    copied,
    run_here,
    stages,
    with_settings,
)

from lloki_atlas.config import PropagationConfig, TileConfig, to_dict
from lloki_atlas.engine.plan import link, run_task
from lloki_atlas.errors import InputError, MemoryBudgetError, NotFoundError
from lloki_atlas.kernels.neighbors import nearest_neighbors
from lloki_atlas.simulation import simulate
from lloki_atlas.stages import outcome, propagate_tasks
from lloki_atlas.stages.create import create_catalog
from lloki_atlas.stages.lineage import expected_objects
from lloki_atlas.stages.pipeline import plan, run
from lloki_atlas.stages.reference import fit_reference
from lloki_atlas.store.arrays import read_arrays
from lloki_atlas.store.catalog import open_catalog, verify
from lloki_atlas.store.scratch import ScratchBlocks

N_CELLS = 700
SLICE = "simmap_1"
CHAINED, STREAMED = {"search_cells": 256}, {"slice_memory_mb": 0}
IN_ONE = TileConfig(tile_cells=128)
STEPS = [
    "space",
    *(f"search1-{own}" for own in range(3)),
    "fill",
    *(f"search2-{own}" for own in range(3)),
]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Sources with a slice of three ranges."""
    folder = tmp_path_factory.mktemp("large")
    simulate(folder, n_cells=2 * N_CELLS, n_slices=2)
    return folder


def profile_of(folder, *, extra):
    """The reference, with that many further counts a cell and gene: denser than the slice, or sparser with none."""
    table = anndata.read_h5ad(folder / "reference.h5ad")
    more = np.random.default_rng(0).poisson(extra, table.shape)
    table.X = csr_matrix(table.X.toarray() + more.astype(np.float32))
    return fit_reference(table, organism="mouse", n_factors=10)


@pytest.fixture(scope="module")
def prepared(large, tmp_path_factory):
    """Catalogs by their reference and tiles whose statistics and panels are there."""
    made = {}

    def of(extra=0.5, tile_cells=128):
        if (extra, tile_cells) not in made:
            config = dataclasses.replace(CONFIG, tile=dataclasses.replace(IN_ONE, tile_cells=tile_cells))
            root = tmp_path_factory.mktemp("prepared") / "atlas"
            catalog = create_catalog(root, reference=profile_of(large, extra=extra), config=config)
            run_here(plan(add_slice(catalog, large, SLICE), until="reference"))
            made[extra, tile_cells] = root
        return made[extra, tile_cells]

    return of


@pytest.fixture
def atlas(prepared, tmp_path):
    """A catalog of the test's own, with other settings of its tiles and of propagation."""

    def of(tile=(), *, extra=0.5, tile_cells=128, **propagation):
        number = len(list(tmp_path.iterdir()))
        catalog = copied(prepared(extra, tile_cells), tmp_path / f"atlas{number}")
        catalog = with_settings(catalog, "tile", **dict(tile)) if tile else catalog
        if "mode" in propagation:  # decides other fields only where they are not given
            propagation = to_dict(PropagationConfig(**propagation))
        return with_settings(catalog, "propagation", **propagation) if propagation else catalog

    return of


def graph(catalog):
    return read_arrays(catalog.path("graphs", catalog.slice(SLICE).objects["propagate"]))


def graph_bytes(catalog):
    return {name: (values.dtype, values.tobytes()) for name, values in graph(catalog).items()}


def propagated(catalog):
    return graph_bytes(run_here(plan(catalog, until="propagate")))


def left_behind(catalog):
    return sorted(path.name for path in (catalog.root / "staging").glob("*"))


SETTINGS = [
    {},
    {"graph_space": "counts"},
    {"storage": "float16"},
    {"bandwidth": "cross", "self_loops": False},
    {"mode": "paper", "n_neighbors": 5, "n_bandwidth_pairs": 200},
]


@pytest.mark.parametrize("extra", [0.5, 0.0], ids=["budgets", "no budget"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_however_the_work_is_cut_the_bytes_of_a_graph_are_the_same(atlas, settings, extra):
    whole = atlas(extra=extra, **settings)
    expected = propagated(whole)
    assert graph(open_catalog(whole.root))["budget"].any() == bool(extra)
    for tile in (CHAINED, {**CHAINED, **STREAMED}):
        assert propagated(atlas(tile, extra=extra, **settings)) == expected


@pytest.mark.parametrize(
    "tile",
    [STREAMED, {"search_cells": 300}, {"search_cells": 512, **STREAMED}, {"search_cells": 1}, {"search_cells": 699}],
    ids=str,
)
def test_ranges_of_any_size_give_the_same_bytes(atlas, tile):
    assert propagated(atlas(tile)) == propagated(atlas())


def test_other_tiles_of_the_source_give_the_same_bytes(atlas):
    assert propagated(atlas({**CHAINED, **STREAMED}, tile_cells=64)) == propagated(atlas())


def test_genes_are_filled_in_and_the_second_graph_is_another(atlas):
    catalog = run_here(plan(atlas(CHAINED), until="propagate"))
    filled = graph(catalog)
    assert (filled["achieved_nonzeros"] <= filled["target_nonzeros"]).all()
    assert filled["n_iterations"][0] > 1
    assert (
        filled["weights"].tobytes() != graph(run_here(plan(atlas(extra=0.0), until="propagate")))["weights"].tobytes()
    )


@pytest.fixture(scope="module")
def built(prepared, tmp_path_factory):
    """Built to the end in one task a slice."""
    return run_here(plan(copied(prepared(), tmp_path_factory.mktemp("built") / "atlas")))


@pytest.mark.parametrize("tile_cells", [128, 64])
def test_vectors_are_the_same_however_the_work_is_cut(atlas, built, tile_cells):
    catalog = run_here(plan(atlas({**CHAINED, **STREAMED}, tile_cells=tile_cells)))
    assert all_bytes(catalog) == all_bytes(built)
    assert left_behind(catalog) == []


@pytest.mark.slow
def test_two_workers_change_no_byte_of_a_chain(atlas, built):
    catalog = run(atlas({**CHAINED, **STREAMED}), progress=False, n_workers=2)
    assert all_bytes(catalog) == all_bytes(built)
    assert graph_bytes(catalog) == graph_bytes(built)
    assert left_behind(catalog) == []
    assert verify(catalog) == []
    assert plan(catalog).tasks == ()


def chain(catalog):
    """Tasks of propagation, each after those that it reads from."""
    return [task for task in plan(catalog, until="propagate").tasks if task.stage == "propagate"]


def name(step):
    return f"propagate/{SLICE}/{step}" if step else f"propagate/{SLICE}"


def test_a_large_slice_is_a_chain_of_tasks(atlas):
    assert [task.name for task in chain(atlas(CHAINED))] == [*map(name, STEPS), name("")]


def test_in_the_published_space_no_task_makes_a_space(atlas):
    assert [task.name for task in chain(atlas(CHAINED, graph_space="counts"))] == [*map(name, STEPS[1:]), name("")]


def test_each_step_waits_for_what_it_reads(atlas):
    requires = {task.name: set(task.requires) for task in chain(atlas(CHAINED))}
    first, second = ([name(f"search{n}-{own}") for own in range(3)] for n in (1, 2))
    assert requires[name("space")] == set()
    assert all(requires[step] == {name("space")} for step in first)
    assert requires[name("fill")] == set(first)
    assert all(requires[step] == {name("fill")} for step in second)
    assert requires[name("")] == {*first, name("fill"), *second}


def test_a_slice_is_counted_once_as_space_and_once_as_graph_in_the_progress(atlas):
    assert {task.name: task.n_cells for task in chain(atlas(CHAINED)) if task.n_cells} == {
        name("space"): N_CELLS,
        name(""): N_CELLS,
    }


@pytest.mark.parametrize(
    "tile",
    [{}, {"search_cells": N_CELLS}, STREAMED, {"search_cells": 1_000_000}],
    ids=["usual", "at", "streamed", "large"],
)
def test_a_slice_of_ordinary_size_is_one_task(atlas, tile):
    assert [task.name for task in chain(atlas(tile))] == [name("")]


@pytest.mark.parametrize(
    "settings",
    [{"support": "redrawn"}, {"split": "stripes"}, {"search": "approximate"}, {"approximate_from": 700}],
    ids=str,
)
def test_what_treats_a_slice_as_one_is_one_task_however_large_it_is(atlas, settings):
    assert [task.name for task in chain(atlas(CHAINED, **settings))] == [name("")]


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_a_slice_runs_in_every_mode(atlas, mode):
    catalog = run_here(
        plan(atlas({**CHAINED, **STREAMED}, mode=mode, n_neighbors=6, max_iterations=3), until="propagate")
    )
    found = graph(catalog)
    assert found["budget"].any()
    assert np.isfinite(found["weights"]).all()


def test_a_published_support_keeps_a_slice_in_memory(atlas):
    (task,) = chain(atlas(STREAMED, support="largest"))
    assert task.arguments["in_memory"]
    (task,) = chain(atlas(STREAMED))
    assert not task.arguments["in_memory"]


def test_an_approximate_search_records_its_recall(atlas, monkeypatch):
    from lloki_atlas.kernels.neighbors import re_rank
    from lloki_atlas.stages import search

    def half_of_them(rows, *, n_neighbors, key):
        indices = nearest_neighbors(rows, n_neighbors=n_neighbors).indices.copy()
        indices[:, ::2] = -1
        return re_rank(rows, indices, n_neighbors=n_neighbors)

    monkeypatch.setattr(search, "descent_neighbors", half_of_them)
    exact, found = (run_here(plan(atlas(search=search), until="propagate")) for search in ("exact", "approximate"))
    assert graph(exact)["recall"].tolist() == [1.0, 1.0]
    np.testing.assert_allclose(graph(found)["recall"], 0.5, atol=0.01)


@pytest.mark.parametrize("done", range(1, len(STEPS) + 1))
def test_a_chain_that_was_interrupted_ends_with_the_same_bytes(atlas, built, done, monkeypatch):
    catalog = atlas(CHAINED)
    for task in chain(catalog)[:done]:
        run_task(task)
    assert len(left_behind(catalog)) == 2 * done  # each with its receipt
    assert [task.name for task in chain(catalog)] == [name(step) for step in [*STEPS, ""][done:]]
    assert propagated(catalog) == graph_bytes(built)
    assert left_behind(catalog) == []


def test_what_a_killed_step_left_is_removed_too(atlas):
    catalog = atlas(CHAINED)
    key = expected_objects(catalog, catalog.slice(SLICE))["propagate"]
    for left in (f"{key}.fill.new-0123abcd", f"{key}.scratch-89abcdef"):
        (catalog.path("staging", left)).mkdir(parents=True)
        (catalog.path("staging", left) / "block-0.bin").write_bytes(b"half a block")
    another = catalog.path("staging", f"{key[::-1]}.filled")
    another.mkdir()
    run_here(plan(catalog, until="propagate"))
    assert left_behind(catalog) == [another.name]


def test_an_interrupted_chain_may_go_on_in_one_task(atlas, built):
    catalog = atlas(CHAINED)
    for task in chain(catalog)[:5]:
        run_task(task)
    assert propagated(with_settings(catalog, "tile", search_cells=10_000)) == graph_bytes(built)
    assert left_behind(catalog) == []


def test_an_interrupted_chain_may_go_on_streamed(atlas, built):
    catalog = atlas(CHAINED)
    for task in chain(catalog)[:4]:
        run_task(task)
    assert propagated(with_settings(catalog, "tile", **STREAMED)) == graph_bytes(built)


def test_steps_of_a_finished_chain_do_nothing(atlas):
    catalog = atlas(CHAINED)
    tasks = chain(catalog)
    done = run_here(plan(catalog, until="propagate"))
    assert left_behind(done) == []
    for task in tasks:
        assert run_task(task) == task.name
    assert left_behind(done) == []
    assert plan(done, until="propagate").tasks == ()


def test_a_step_whose_inputs_are_gone_is_refused_while_there_is_no_graph(atlas):
    with pytest.raises(NotFoundError, match=r"there are no arrays at .*search1-0"):
        run_task(chain(atlas(CHAINED))[4])


def test_neighbours_of_ranges_are_those_of_the_whole_slice(atlas):
    catalog = atlas(CHAINED)
    tasks = chain(catalog)[:4]
    for task in tasks:
        run_task(task)
    ranges = tasks[1].arguments["ranges"]
    assert ranges == [[0, 256], [256, 512], [512, N_CELLS]]
    merged = propagate_tasks._merged_indices([task.output.path for task in tasks[1:]], ranges, 8)
    rows = read_arrays(tasks[0].output.path, ["rows"])["rows"]
    np.testing.assert_array_equal(merged, nearest_neighbors(rows, n_neighbors=8).indices)


def test_linking_a_chain_again_changes_nothing(atlas):
    tasks = plan(atlas(CHAINED), until="propagate").tasks
    assert link(tasks) == tasks


def test_a_published_support_of_a_streamed_slice_is_refused_with_advice(atlas):
    (task,) = chain(atlas(support="largest"))
    with pytest.raises(InputError, match="raise slice_memory_mb and search_cells"):
        propagate_tasks.compute(**{**task.arguments, "in_memory": False})


def test_a_task_that_does_not_fit_is_refused_with_the_settings_that_help(atlas):
    with pytest.raises(MemoryBudgetError, match="slice_memory_mb or search_cells smaller"):
        plan(atlas(CHAINED), until="propagate").validate(2**20)


def test_only_what_belongs_to_a_key_is_cleaned_up(tmp_path, atlas):
    catalog = atlas()
    for left in ("abc.space", "abc.search1-0.json", "abcd.space", "abc"):
        Path(catalog.path("staging", left)).parent.mkdir(exist_ok=True)
        Path(catalog.path("staging", left)).write_text("")
    outcome.clean_up(catalog, "abc")
    assert left_behind(catalog) == ["abc", "abcd.space"]


def test_a_chain_is_planned_by_the_number_of_its_tasks(atlas):
    assert stages(plan(atlas(CHAINED), until="propagate")) == {"propagate": len(STEPS) + 1}


@pytest.mark.parametrize("space", ["scaled", "counts"])
def test_a_slice_of_less_than_a_block_may_be_a_chain_too(ingested, tmp_path, space):
    def made(**tile):
        catalog = copied(ingested, tmp_path / f"atlas{len(tile)}")
        catalog = with_settings(with_settings(catalog, "tile", **tile), "propagation", graph_space=space)
        return run_here(plan(catalog, slices=[SLICE], until="propagate"))

    assert graph_bytes(made(search_cells=7, slice_memory_mb=0)) == graph_bytes(made(search_cells=100))


@pytest.mark.parametrize(("before", "after", "n_done"), [(256, 512, 2), (256, 512, 6), (512, 256, 3), (512, 256, 5)])
def test_an_interrupted_chain_may_go_on_with_other_ranges(atlas, built, before, after, n_done):
    catalog = atlas({"search_cells": before})
    for task in chain(catalog)[:n_done]:
        run_task(task)
    catalog = run_here(plan(with_settings(catalog, "tile", search_cells=after), until="propagate"))
    assert graph_bytes(catalog) == graph_bytes(built)
    assert left_behind(catalog) == []


def test_a_run_whose_scratch_another_finished_run_removed_ends_well(atlas, built, monkeypatch):
    catalog = atlas({"slice_memory_mb": 0})
    (task,) = chain(catalog)
    read, finished = ScratchBlocks.read, []

    def read_after_another_run(blocks, block):
        if not finished:
            finished.append(True)
            finished.append(run_here(plan(catalog, until="propagate")))
        return read(blocks, block)

    monkeypatch.setattr(ScratchBlocks, "read", read_after_another_run)
    assert run_task(task) == task.name
    assert graph_bytes(finished[1]) == graph_bytes(built)

"""A worker that is killed where it writes: the run goes on with the others, and not a byte is another."""

from __future__ import annotations

import pytest
from support.aftermath import reachable_files, strange_names
from support.atlases import copied
from support.write_points import BEFORE, TORN, Point, WritePoints

from lloki_atlas.engine.cluster import local_client
from lloki_atlas.stages.pipeline import plan, run
from lloki_atlas.store.catalog import open_catalog, verify

# the first call of its name on whichever worker comes to it first
POINTS = [
    ("rename embeddings/<key>.zarr", BEFORE),
    ("open staging/<key>.tiles/<row>.json (temporary)", BEFORE),
    ("rename staging/<key>.tiles/<row>.json", TORN),
    ("fsync staging/<key>/chunk (temporary)", TORN),
    ("rename staging/<key>/chunk", BEFORE),
    ("unlink staging/<key>.tiles/<row>.json", BEFORE),
    ("rmdir staging/<key>.tiles", BEFORE),
    ("link embeddings/<key>.zarr.json", BEFORE),
    ("unlink embeddings/<key>.zarr.json (temporary)", BEFORE),
    ("rename staging/<key>-<try>/chunk", TORN),
    ("rename statistics/<key>.zarr", BEFORE),
    ("link graphs/<key>.zarr.json", BEFORE),
    ("rename staging/<key>.training", BEFORE),
    ("fsync staging/<key>-<try>/weights.safetensors", BEFORE),
    ("rename models/<key>", BEFORE),
]
SLOW = [pytest.param(*point, marks=pytest.mark.slow) for point in POINTS[1:]]


@pytest.fixture(scope="module")
def two_workers():
    """Two worker processes that are started again when they die."""
    with local_client(2, 0) as made:
        yield made


def watch(root, name, ending, claim):
    """Called on a worker: die at the point, unless another did."""
    WritePoints(root, stop=Point(name, 0, ending), claim=claim).install()


@pytest.mark.parametrize(("name", "ending"), [POINTS[0], *SLOW])
def test_a_run_outlives_a_worker_that_dies_at_a_write_point(two_workers, ingested, built, tmp_path, name, ending):
    root, claim = tmp_path / "atlas", tmp_path / "died"
    catalog = copied(ingested, root)
    two_workers.wait_for_workers(2, timeout=60)
    two_workers.run(watch, root, name, ending, claim)
    after = run(catalog, client=two_workers, progress=False)
    assert claim.exists(), "no worker came to the point"
    undisturbed = open_catalog(built)
    assert after.state == undisturbed.state == open_catalog(root).state
    assert reachable_files(after) == reachable_files(undisturbed)
    assert verify(after) == []
    assert strange_names(root) == []
    assert plan(after).tasks == ()

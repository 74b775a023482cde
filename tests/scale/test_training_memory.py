"""Memory of training the autoencoder: as projected, and independent of the size of the atlas."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.training_memory import run

pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux tells the peak and bytes read")


def test_training_takes_no_more_memory_than_projected():
    found = run(6000, n_epochs=1, chunk_cells=1000)
    assert found["growth"] <= found["projected"]


@pytest.mark.slow
def test_training_on_more_cells_takes_no_more_memory():
    small, large = (run(n_cells, n_epochs=2) for n_cells in (20_000, 400_000))
    assert large["peak"] <= 1.1 * small["peak"]
    assert large["peak"] < 2 * 2**30
    for found in (small, large):
        assert found["growth"] <= found["projected"] <= 4 * found["growth"] + 64 * 2**20


@pytest.mark.slow
def test_large_chunks_take_no_more_memory_than_projected():
    found = run(40_000, n_epochs=1, chunk_cells=16_000)
    assert found["growth"] <= found["projected"]


@pytest.mark.slow
def test_an_epoch_of_a_part_of_the_cells_reads_no_more_than_that_part():
    """To count the cells that have an embedding, for the sample that the weights start from, and to train."""
    found = run(400_000, n_epochs=1, max_cells_per_technology=10_000)
    assert found["bytes_read"] <= 3.2 * 5 * 10_000 * 1024

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import anndata as ad
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lloki_atlas.simulation.write import Block, write_h5ad, write_text

SYMBOLS = ("Gad1", "Sst", "Mbp")


def blocks_of(counts: np.ndarray, borders: list[int]) -> Iterator[Block]:
    for start, stop in zip([0, *borders], [*borders, len(counts)], strict=True):
        rows = np.arange(start, stop)
        yield Block(
            counts=counts[start:stop],
            names=[f"cell-{row}" for row in rows],
            columns={"kind": (rows % 2).astype(np.int8), "depth": rows.astype(np.float32)},
            coordinates=np.stack([rows, -rows], axis=1).astype(np.float32),
        )


def write(path: Path, blocks: Iterator[Block], *, n_cells: int) -> None:
    write_h5ad(
        path,
        blocks,
        n_cells=n_cells,
        symbols=SYMBOLS,
        categories={"kind": ("even", "odd")},
        numbers=("depth",),
        source={"unit": "micrometer", "um_per_unit": 1.0},
    )


@settings(deadline=None, max_examples=25)
@given(data=st.data(), n_cells=st.integers(1, 40))
def test_what_is_read_does_not_depend_on_the_blocks(data: st.DataObject, n_cells: int) -> None:
    counts = np.random.default_rng(n_cells).poisson(0.7, size=(n_cells, 3))
    borders = sorted(data.draw(st.lists(st.integers(0, n_cells), max_size=4)))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "slice.h5ad"
        write(path, blocks_of(counts, borders), n_cells=n_cells)
        adata = ad.read_h5ad(path)

    assert np.array_equal(adata.X.toarray(), counts)
    assert list(adata.obs_names) == [f"cell-{row}" for row in range(n_cells)]
    assert list(adata.obs["kind"]) == ["even" if row % 2 == 0 else "odd" for row in range(n_cells)]
    assert np.array_equal(adata.obs["depth"], np.arange(n_cells))
    assert np.array_equal(adata.obsm["spatial"][:, 1], -np.arange(n_cells))
    assert tuple(adata.var_names) == SYMBOLS
    assert dict(adata.uns["source"]) == {"unit": "micrometer", "um_per_unit": 1.0}


def test_the_file_can_be_opened_backed(tmp_path: Path) -> None:
    counts = np.arange(12).reshape(4, 3)
    write(tmp_path / "slice.h5ad", blocks_of(counts, [2]), n_cells=4)

    adata = ad.read_h5ad(tmp_path / "slice.h5ad", backed="r")
    try:
        assert np.array_equal(adata.X[1:3].toarray(), counts[1:3])
    finally:
        adata.file.close()


def test_what_anndata_writes_back_is_the_same(tmp_path: Path) -> None:
    write(tmp_path / "slice.h5ad", blocks_of(np.arange(12).reshape(4, 3), [2]), n_cells=4)
    adata = ad.read_h5ad(tmp_path / "slice.h5ad")
    adata.write_h5ad(tmp_path / "again.h5ad")
    again = ad.read_h5ad(tmp_path / "again.h5ad")

    assert again.obs.equals(adata.obs)
    assert np.array_equal(again.X.toarray(), adata.X.toarray())


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "slice.h5ad"
    counts = np.ones((4, 3), dtype=np.int64)
    write(path, blocks_of(counts, []), n_cells=4)
    before = path.read_bytes()

    def failing() -> Iterator[Block]:
        yield from blocks_of(counts[:2], [])
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write(path, failing(), n_cells=4)

    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["slice.h5ad"]


def test_too_few_cells_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="3 cells were given for 4"):
        write(tmp_path / "slice.h5ad", blocks_of(np.ones((3, 3)), []), n_cells=4)

    assert not list(tmp_path.iterdir())


def test_a_block_with_parts_of_different_length_is_refused() -> None:
    with pytest.raises(AssertionError, match="different lengths"):
        Block(counts=np.ones((2, 3)), names=["only-one"], columns={}, coordinates=None)


def test_text_replaces_text(tmp_path: Path) -> None:
    write_text(tmp_path / "atlas.toml", "old")
    write_text(tmp_path / "atlas.toml", "new")

    assert (tmp_path / "atlas.toml").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1

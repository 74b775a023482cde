"""Stored embeddings to train the autoencoder on, without the stages that make them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lloki_atlas.store.arrays import ArraySpec, create_arrays, write_rows

N_TYPES = 6


def draw_embeddings(n: int, platform: int, *, seed: int, offset: float = 0.5) -> np.ndarray:
    """Unit vectors (n, 512) float16 of cell types that every platform shows, shifted by an offset of its own."""
    shared, rng = np.random.default_rng(0), np.random.default_rng([1, platform, seed])
    centers = shared.normal(size=(N_TYPES, 512)).astype(np.float32)
    shift = np.random.default_rng([2, platform]).normal(size=512).astype(np.float32)
    values = centers[rng.integers(0, N_TYPES, n)] + offset * shift
    values += 0.5 * rng.standard_normal((n, 512), dtype=np.float32)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def write_embedding(path: Path, values: np.ndarray | Sequence[np.ndarray], *, tile_cells: int) -> Path:
    """Write an embedding as the stage does; `values` may come in parts of whole tiles."""
    parts = [values] if isinstance(values, np.ndarray) else values
    n_cells = sum(len(part) for part in parts)
    create_arrays(path, {"X_fp": ArraySpec((n_cells, 512), "float16", tile_cells, ("cell", "dimension"))})
    start = 0
    for part in parts:
        write_rows(path, "X_fp", start, part)
        start += len(part)
    return path


def write_samples(
    folder: Path, values: Mapping[str, Sequence[np.ndarray]], *, tile_cells: int = 1000, token_by: str = "platform"
) -> list[dict[str, Any]]:
    """Write one embedding for each array of each platform; what the training task is given of them."""
    samples = []
    for platform, slices in values.items():
        for number, rows in enumerate(slices):
            slice_id = f"{platform}_{number}"
            path = write_embedding(folder / f"{slice_id}.zarr", rows, tile_cells=tile_cells)
            samples.append(sample_of(slice_id, f"{platform}|panel", path, len(rows), token_by=token_by))
    return samples


def sample_of(slice_id: str, platform: str, path: Path, n_cells: int, *, token_by: str = "platform") -> dict[str, Any]:
    """What the training task is told of a slice."""
    return {
        "slice_id": slice_id,
        "platform": platform,
        "token": platform if token_by == "platform" else f"{platform}|{slice_id}",
        "n_cells": n_cells,
        "embedding_key": f"key of {slice_id}",
        "embedding_path": str(path),
        "slice_path": "",
    }

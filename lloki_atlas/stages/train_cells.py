"""Chunks of cells for training, read from stored embeddings while the chunk before is trained on.

Cells are read in blocks of 256 rows of a slice, which have nothing to do with its tiles. An epoch takes blocks of every
platform in random order; as many as fit into a pool are read, and their cells are dealt out to chunks at random.
An epoch that fits into the pool is dealt out as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from mmap import mmap
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.engine.overlap import ahead
from lloki_atlas.errors import InputError
from lloki_atlas.stages.train_blocks import BATCH_BLOCKS, Index, count_cells, read_blocks, token_blocks

if TYPE_CHECKING:
    from lloki_atlas.models.step import Chunk
    from lloki_atlas.stages.train_labels import Codes

# torch loads where a task needs it: the driver, `status` and `plan` do without
N_EMBEDDING = 512
POOL_CELLS = 32_768
GATHERED_ROWS = 256
# blocks from which the held-out cells of a platform are drawn
HELD_OUT_BLOCKS = 32


@dataclass(frozen=True)
class _Part:
    """Blocks of one token, and how many cells to take of each; fewer than there are means a random choice."""

    token: int
    blocks: Index
    take: Index


@dataclass(frozen=True)
class _Pool:
    """Cells in memory: embeddings as they are stored, and for each cell its token, slice and label."""

    embeddings: NDArray[np.float16]
    platform: Index
    slice_codes: Index
    labels: Index | None

    def chunk(self, rows: Index) -> Chunk:
        from lloki_atlas.models.step import Chunk

        labels = None if self.labels is None else self.labels[rows]
        embeddings = _returned_memory(len(rows), np.float32)
        for start in range(0, len(rows), GATHERED_ROWS):
            part = slice(start, start + GATHERED_ROWS)
            embeddings[part] = self.embeddings[rows[part]]
        return Chunk(embeddings, self.platform[rows], self.slice_codes[rows], labels)


class StoredCells:
    """Chunks of the cells of stored embeddings; those without one are left out.

    Parameters
    ----------
    samples
        For each slice `slice_id`, `platform`, `token`, `n_cells` and `embedding_path`.
    config
        Settings of the training.
    labels
        For each slice the labels of its cells, -1 where unknown.
    hold_out
        Whether blocks are left out for validation.
    pool_cells
        Cells that are dealt out together; at least a chunk.

    Raises
    ------
    InputError
        When cells are read: if no cell of a platform has an embedding, or one is not finite in part.
    """

    def __init__(
        self,
        samples: Sequence[dict[str, Any]],
        *,
        config: AutoencoderConfig,
        labels: Sequence[Codes] | None = None,
        hold_out: bool = False,
        pool_cells: int = POOL_CELLS,
    ) -> None:
        self.tokens, self._limits = zip(*most_cells(samples, config.max_cells_per_technology), strict=True)
        self._samples, self._config, self._labels = samples, config, labels
        self._pool_cells = max(pool_cells, config.chunk_cells)
        share = config.held_out if hold_out else 0.0
        self._blocks = [
            token_blocks(samples, name, share=share, random_state=config.random_state) for name in self.tokens
        ]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Cells of each token in an epoch."""
        return tuple(int(part.take.sum()) for part in self._choose(1))

    def epoch(self, number: int) -> Generator[Chunk, None, None]:
        """Chunks of an epoch, which is numbered from 1; the next is made while one is used."""
        yield from ahead(self._deal(number), lambda dealt: dealt[0].chunk(dealt[1]))

    def held_out(self) -> list[Chunk]:
        """Chunks of the held-out cells, equally many of each token as far as there are; none where none are."""
        from lloki_atlas.models.training_chunks import keyed

        if not self.n_held_out:
            return []
        pool = self._read(self._validation, 0)
        return [pool.chunk(rows) for rows in self._cut(pool, keyed(self._config.random_state, "held-out chunks"))]

    @property
    def n_held_out(self) -> int:
        """Cells from which the chunks of `held_out` are made."""
        return sum(int(part.take.sum()) for part in self._validation)

    @cached_property
    def _validation(self) -> list[_Part]:
        from lloki_atlas.models.training_chunks import MAX_HELD_OUT

        quota = max(1, MAX_HELD_OUT // len(self.tokens))
        parts = []
        for code, blocks in enumerate(self._blocks):
            chosen = blocks.held_out[: min(HELD_OUT_BLOCKS, quota)]
            counts = count_cells(self._samples, blocks, chosen)
            chosen, counts = chosen[counts > 0], counts[counts > 0]
            if len(chosen):
                shares = quota // len(chosen) + (np.arange(len(chosen)) < quota % len(chosen))
                parts.append(_Part(code, chosen, np.minimum(counts, shares)))
        return parts

    def _choose(self, epoch: int) -> list[_Part]:
        """Blocks of every token in the order in which an epoch takes them, up to the most cells that it may have."""
        from lloki_atlas.models.training_chunks import BLOCK_ROWS, keyed

        parts = []
        for code, (blocks, limit) in enumerate(zip(self._blocks, self._limits, strict=True)):
            order = keyed(self._config.random_state, f"blocks/{blocks.name}", epoch).permutation(blocks.training)
            total = place = 0
            while total < limit and place < len(order):
                # never more than fill up the rest, so that only the last one can be too much
                batch = order[place : place + min(BATCH_BLOCKS, -(-(limit - total) // BLOCK_ROWS))]
                total += int(count_cells(self._samples, blocks, batch).sum())
                place += len(batch)
            if not total:
                raise InputError(
                    f"no cell of '{blocks.name}' that could be trained on has an embedding: leave its slices out, or "
                    "check that their genes are among those of the reference"
                )
            take = blocks.counts[order[:place]]
            take[-1] -= max(0, total - limit)
            parts.append(_Part(code, order[:place][take > 0], take[take > 0]))
        return parts

    def _deal(self, epoch: int) -> Iterator[tuple[_Pool, Index]]:
        """Pools, and which of their cells make a chunk; the next pool is read meanwhile."""
        from lloki_atlas.models.training_chunks import keyed, plan_rounds

        parts = self._choose(epoch)
        rounds = [
            [_Part(part.token, part.blocks[rows], part.take[rows]) for part, rows in zip(parts, taken, strict=True)]
            for taken in plan_rounds([part.take for part in parts], pool_cells=self._pool_cells)
        ]
        generator = keyed(self._config.random_state, "chunks", epoch)
        with closing(ahead(rounds, lambda taken: self._read(taken, epoch))) as pools:  # type: ignore[type-var]
            for pool in pools:
                for rows in self._cut(pool, generator):
                    yield pool, rows
                del pool  # before the next but one is read; `enumerate` would hold it too

    def _cut(self, pool: _Pool, generator: np.random.Generator) -> list[Index]:
        from lloki_atlas.models.pairs import balanced_chunks

        return balanced_chunks(pool.platform, chunk_cells=self._config.chunk_cells, generator=generator)

    def _read(self, parts: Sequence[_Part], epoch: int) -> _Pool:
        from lloki_atlas.models.training_chunks import keyed

        tokens = np.repeat([part.token for part in parts], [len(part.blocks) for part in parts])
        numbers, take = (np.concatenate([getattr(part, name) for part in parts]) for name in ("blocks", "take"))
        slices, starts, stops = (
            np.concatenate([getattr(self._blocks[part.token], name)[part.blocks] for part in parts])
            for name in ("slices", "starts", "stops")
        )
        n_cells = int(take.sum())
        labels = None if self._labels is None else np.empty(n_cells, np.int64)
        pool = _Pool(_returned_memory(n_cells, np.float16), np.repeat(tokens, take), np.repeat(slices, take), labels)
        begins = np.cumsum(take) - take
        for place, values, rows in read_blocks(self._samples, slices, starts, stops):
            cells = slice(begins[place], begins[place] + take[place])
            if take[place] < len(rows):
                purpose = f"rows/{self.tokens[tokens[place]]}"
                generator = keyed(self._config.random_state, purpose, epoch, int(numbers[place]))
                chosen = np.sort(generator.permutation(len(rows))[: take[place]])
                values, rows = values[chosen], rows[chosen]
            pool.embeddings[cells] = values
            if self._labels is not None and labels is not None:
                labels[cells] = self._labels[slices[place]][rows]
        return pool


def _returned_memory(n_cells: int, dtype: Any) -> NDArray[Any]:
    """Room for embeddings that goes back to the system when it is dropped: the allocator of a thread may keep it."""
    values = np.frombuffer(mmap(-1, n_cells * N_EMBEDDING * np.dtype(dtype).itemsize), dtype)
    return values.reshape(-1, N_EMBEDDING)


def most_cells(samples: Sequence[dict[str, Any]], max_cells: int) -> list[tuple[str, int]]:
    """Tokens in the order of their numbers, and the most cells of each in an epoch.

    The tokens of a platform share what it may have, `max_cells`.
    """
    cells: dict[str, int] = {}
    for sample in samples:
        cells[sample["token"]] = cells.get(sample["token"], 0) + sample["n_cells"]
    platforms = {sample["token"]: sample["platform"] for sample in samples}
    n_tokens = Counter(platforms.values())
    return [(name, min(cells[name], max(2, max_cells // n_tokens[platforms[name]]))) for name in sorted(cells)]

"""The encoder of a trained autoencoder, frozen for use.

It is three matrix products, and what lies between them is kept small. Cells pass in blocks whose intermediate values
stay in the cache, in buffers that each thread has once; stored float16 is widened a block at a time. Tokens are part of
the first bias. Hidden layers do without adding theirs: relu(z + b) = max(z, -b) + b, and what that last b adds to the
next layer is the same for all cells, so it is part of the next bias.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.nn import functional

from lloki_atlas.errors import InputError
from lloki_atlas.models.autoencoder import N_EMBEDDING, N_LATENT, ConditionalAutoencoder
from lloki_atlas.models.threads import single_thread
from lloki_atlas.models.workers import Workers

# rows of a product: always equally many, so that a cell's bits do not depend on what passes with it; few enough that
# their values stay in the cache, many enough that threads seldom meet at the interpreter's lock
BLOCK_ROWS = 512
# cells that a thread takes at a time
_PART_ROWS = 4 * BLOCK_ROWS
# hidden layers are filled up with zeros to whole vector registers
_LANES = 16
_CPU = torch.device("cpu")
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class _Layer(NamedTuple):
    """A product with `weight`, and then the larger of it and the offset, or it and the offset, or ReLU of that.

    The offset has a row a platform, or is that of one platform.
    """

    weight: torch.Tensor
    offset: torch.Tensor
    rule: Literal["larger", "sum", "relu"]

    def finish(self, product: torch.Tensor) -> torch.Tensor:
        """What follows the product, in place."""
        if self.rule == "larger":
            return torch.maximum(product, self.offset, out=product)
        values = product.add_(self.offset)
        return values.relu_() if self.rule == "relu" else values


class FrozenEncoder:
    """The encoder of a trained model, for use only; the model given is copied.

    Parameters
    ----------
    model : ConditionalAutoencoder
    precision : {"float32", "bfloat16"}
        Of weights and products. bfloat16 pays on a processor that has instructions for it, and takes several times as
        long on one that has none.

    Raises
    ------
    InputError
        If there is no such precision.
    """

    def __init__(self, model: ConditionalAutoencoder, *, precision: str = "float32") -> None:
        if precision not in _PRECISIONS:
            raise InputError(f"the encoder has no precision '{precision}': choose from {', '.join(_PRECISIONS)}")
        self.platforms: tuple[str, ...] = model.platforms
        self._dtype = _PRECISIONS[precision]
        with single_thread(), torch.no_grad():
            self._layers = {_CPU: _prepared(model, self._dtype)}

    def encode_tensor(self, embeddings: torch.Tensor, platform: str | int) -> torch.Tensor:
        """Latents of cells whose embeddings are on a device, computed there; equal to `encode` within rounding.

        Parameters
        ----------
        embeddings : (n, 512) float
            On any device; rows that are not finite give NaN.
        platform : str or int
            As for `encode`.

        Returns
        -------
        (n, 128) float32, on the same device

        Raises
        ------
        InputError
            If the platform is not among those of the model.
        """
        layers = self._layers_of(platform, embeddings.device)
        with torch.no_grad():
            values = embeddings.to(self._dtype)
            for layer in layers:
                values = layer.finish(values @ layer.weight)
            return values.float().where(embeddings.isfinite().all(dim=1, keepdim=True), torch.nan)

    def encode(self, embeddings: ArrayLike, platform: str | int, *, n_threads: int = 1) -> NDArray[np.float32]:
        """Latents of the cells of one platform.

        The bytes of a cell's row depend on its embedding and platform alone: cells pass in blocks of 512 rows, the
        last one filled up, each on one thread.

        Parameters
        ----------
        embeddings : (n, 512) float
            float16, as it is stored, is taken as it is; anything else as float32.
        platform : str or int
            "technology|panel", or its number.
        n_threads : int
            Threads, each with blocks of its own.

        Returns
        -------
        (n, 128) float32
            NaN in the rows of cells whose embedding is not finite.

        Raises
        ------
        InputError
            If the platform is not among those of the model, or rows are not 512 long.
        """
        layers = self._layers_of(platform, _CPU)
        given = np.asarray(embeddings)
        if given.ndim != 2 or given.shape[1] != N_EMBEDDING:
            raise InputError(f"embeddings are of shape {given.shape}: give (n_cells, {N_EMBEDDING})")
        with torch.inference_mode():
            latents = torch.empty((len(given), N_LATENT))
        # threads take parts in turn, so that one that is held up holds up no other
        starts = iter(range(0, len(given), _PART_ROWS))

        def encode_parts(_: int) -> None:
            with torch.inference_mode():
                blocks = _Blocks(layers)
                for start in starts:
                    part = slice(start, start + _PART_ROWS)
                    blocks.encode(given[part], latents[part])

        with Workers(n_threads) as workers:
            workers.each(encode_parts, range(n_threads))
        return latents.numpy()

    def _layers_of(self, platform: str | int, device: torch.device) -> list[_Layer]:
        code = self._code(platform)
        if device not in self._layers:
            self._layers[device] = [
                _Layer(layer.weight.to(device), layer.offset.to(device), layer.rule) for layer in self._layers[_CPU]
            ]
        return [layer._replace(offset=layer.offset[code]) for layer in self._layers[device]]

    def _code(self, platform: str | int) -> int:
        if isinstance(platform, str):
            if platform in self.platforms:
                return self.platforms.index(platform)
        elif 0 <= platform < len(self.platforms):
            return int(platform)
        raise InputError(
            f"this encoder has no platform {platform!r}, it knows {', '.join(self.platforms)}: "
            "to add one, train the autoencoder on a sample that holds cells of it"
        )


def _prepared(model: ConditionalAutoencoder, dtype: torch.dtype) -> list[_Layer]:
    """The layers as the products want them: transposed, hidden ones filled up, all biases for every platform."""
    layers: list[_Layer] = []
    tokens, width = model.encoder_tokens.weight, N_EMBEDDING
    missing = tokens.new_zeros((len(tokens), width))  # what the inputs of a layer are short of
    for linear in model.encoder:
        last, rectified = linear is model.encoder[-1], True
        more = 0 if last else -linear.out_features % _LANES
        weight = linear.weight[:, :N_EMBEDDING].T
        weight = functional.pad(weight, (0, more, 0, width - len(weight))).contiguous().to(dtype)
        biases = []
        # one platform after the other: the bits of one must not depend on how many there are
        for token, short in zip(tokens.split(1), missing.split(1), strict=True):
            given = linear.bias[None] if layers else functional.linear(token, linear.weight[:, width:], linear.bias)
            biases.append(functional.pad(given, (0, more)) + short @ weight.float())
        bias = torch.cat(biases).to(dtype)
        folded = rectified and not last
        layers.append(_Layer(weight, -bias if folded else bias, "larger" if folded else "relu" if rectified else "sum"))
        missing, width = bias.float() if folded else torch.zeros_like(bias).float(), weight.shape[1]
    return layers


class _Blocks:
    """Cells through the layers block by block, in buffers of one thread, on which torch runs single-threaded."""

    def __init__(self, layers: list[_Layer]) -> None:
        dtype = layers[0].weight.dtype
        self._first, *self._others = layers
        self._block = torch.zeros((BLOCK_ROWS, N_EMBEDDING), dtype=dtype)
        self._made = [torch.zeros((BLOCK_ROWS, layer.weight.shape[1]), dtype=dtype) for layer in layers]
        # what is not finite makes every unit of the first layer so; afterwards minus infinity is no longer to be seen
        self._unit = self._made[0][:, 0]
        self._units = torch.zeros(_PART_ROWS, dtype=dtype)

    def encode(self, embeddings: NDArray[Any], latents: torch.Tensor) -> None:
        """Encode the cells of a part into `latents`."""
        kind = np.float16 if embeddings.dtype == np.float16 else np.float32
        rows = torch.from_numpy(np.require(embeddings, kind, ["C", "W"]))
        whole = len(rows) // BLOCK_ROWS * BLOCK_ROWS
        if whole:
            self._encode_whole(rows[:whole], latents[:whole])
        if whole < len(rows):
            filled, found = torch.zeros((BLOCK_ROWS, N_EMBEDDING), dtype=rows.dtype), torch.zeros(BLOCK_ROWS, N_LATENT)
            filled[: len(rows) - whole] = rows[whole:]
            self._encode_whole(filled, found)
            latents[whole:] = found[: len(rows) - whole]

    def _encode_whole(self, rows: torch.Tensor, latents: torch.Tensor) -> None:
        """Encode whole blocks."""
        first, (hidden, *between, last), units = self._first, self._made, self._units[: len(rows)]
        direct = last.dtype == latents.dtype
        for block, target, unit in zip(*(part.split(BLOCK_ROWS) for part in (rows, latents, units)), strict=True):
            values = torch.mm(self._block.copy_(block), first.weight, out=hidden)
            unit.copy_(self._unit)
            values = first.finish(values)
            for layer, out in zip(self._others, [*between, target if direct else last], strict=True):
                values = layer.finish(torch.mm(values, layer.weight, out=out))
            if not direct:
                target.copy_(values)
        finite = units.isfinite()
        if not finite.all():
            latents[~finite] = torch.nan

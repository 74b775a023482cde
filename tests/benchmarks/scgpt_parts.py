"""What scGPT's forward pass is made of on one core: rates of its products, and what was tried to make them faster.

    python -m tests.benchmarks.scgpt_parts [--length 320] [--compile] [--json]

Milliseconds (CPU time of one thread, best of several) and GFLOP/s, for one cell of --length tokens and random weights
in the published shapes: the product for queries, keys and values in each type, 8-bit products and their error,
attention, a whole layer, a layer under `torch.compile` with packed weights (--compile; takes a compiler), a whole cell
without loading or tokens, and tokens of 256 cells.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from lloki_atlas.models.scgpt import ScGPT, embed_tokens, load_scgpt
from lloki_atlas.models.threads import single_thread
from lloki_atlas.models.transformer import _mix, _queries_keys_values
from tests.benchmarks.scgpt import N_GENES, operations
from tests.support.checkpoints import write_checkpoint

WIDTH, HEADS = 512, 8


def milliseconds(run: Callable[[], Any], *, repeats: int = 15) -> float:
    """CPU time of this thread, the best of several."""
    run()
    best = np.inf
    for _ in range(repeats):
        started = time.thread_time()
        run()
        best = min(best, time.thread_time() - started)
    return float(best * 1e3)


def one_layer(model: ScGPT, x: torch.Tensor) -> torch.Tensor:
    """One layer for every token of a cell."""
    layer = model.layers[0]
    q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in _queries_keys_values(layer, x))
    return _mix(layer, x, scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def eight_bit(x: torch.Tensor, weight: torch.Tensor) -> tuple[Callable[[], torch.Tensor], float]:
    """A product with weights and rows in 8 bits, and its relative error."""
    scales = weight.abs().amax(1) / 127
    zeros = torch.zeros(len(weight), dtype=torch.long)
    packed = torch.ops.quantized.linear_prepack(torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8), None)
    exact, found = x @ weight.t(), torch.ops.quantized.linear_dynamic(x, packed)
    return lambda: torch.ops.quantized.linear_dynamic(x, packed), float((found - exact).norm() / exact.norm())


def measure(model: ScGPT, length: int, *, compiled: bool) -> list[dict[str, Any]]:
    """Every part as a row."""
    x, weight = torch.randn(1, length, WIDTH), torch.randn(3 * WIDTH, WIDTH) * 0.05
    found: list[dict[str, Any]] = []

    def add(name: str, run: Callable[[], Any], n_operations: float, **more: Any) -> None:
        taken = milliseconds(run)
        found.append({"part": name, "ms": taken, "gflops": n_operations / taken / 1e6, **more})

    product = 2 * length * WIDTH * 3 * WIDTH
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        left, right = x[0].to(dtype), weight.t().contiguous().to(dtype)
        add(f"queries, keys, values: {dtype}".replace("torch.", ""), lambda a=left, b=right: a @ b, product)
    two, right = torch.randn(2, length, WIDTH), weight.t().contiguous()
    add("the same, two cells at once", lambda: torch.bmm(two, right.expand(2, -1, -1)), 2 * product)
    add("the same as three products", lambda: [x[0] @ part for part in right.split(WIDTH, dim=1)], product)
    run, error = eight_bit(x[0], weight)
    add("the same in 8 bits", run, product, relative_error=error)
    q, k, v = torch.randn(3, 1, length, HEADS, WIDTH // HEADS).transpose(2, 3)
    add("attention", lambda: scaled_dot_product_attention(q, k, v), 4 * length**2 * WIDTH)
    layer = 12 * length * WIDTH**2 + 4 * length**2 * WIDTH
    add("layer", lambda: one_layer(model, x), layer)
    if compiled:
        from torch._inductor import config

        config.freezing = True
        with torch.inference_mode(False), torch.no_grad():
            faster = torch.compile(lambda rows: one_layer(model, rows))
            inside = x.clone()
            add("layer, compiled", lambda: faster(inside), layer)
    genes = [f"GENE{i}" for i in range(N_GENES)]
    rows = np.zeros((1, N_GENES), dtype=np.float32)
    rows[0, : length - 1] = np.random.default_rng(0).permutation(length - 1) + 1.5
    tokens = model.tokens(rows, genes)
    add("cell", lambda: embed_tokens(model, tokens), operations(model, rows))
    add("tokens of 256 cells", lambda: model.tokens(np.repeat(rows, 256, axis=0), genes), 0.0)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=320)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        genes = [f"GENE{i}" for i in range(N_GENES)]
        folder = write_checkpoint(Path(scratch), genes=genes, embsize=WIDTH, nheads=HEADS, d_hid=WIDTH, nlayers=12)
        model = load_scgpt(folder, device="cpu")
    with single_thread(), torch.no_grad():
        found = measure(model, given.length, compiled=given.compile)
    for row in found:
        print("  ".join(f"{key} {value:.4g}" if key != "part" else f"{value:38}" for key, value in row.items()))
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()

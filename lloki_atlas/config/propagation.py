"""Settings of LLOKI-FP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lloki_atlas.config.checks import require

# what a mode decides for fields that are not given: the equations as printed, and the published code's behaviour
_MODES: dict[str, dict[str, Any]] = {
    "default": {
        "graph_space": "scaled",
        "bandwidth": "pairs",
        "n_bandwidth_pairs": 10_000,
        "sparsity_cdf": "midrank",
        "sparsity_match": "rank",
        "sparsity_genes": "shared",
        "support": "frozen",
        "stopping": "relative",
        "split": "none",
    },
    "paper": {
        "graph_space": "counts",
        "bandwidth": "pairs",
        "n_bandwidth_pairs": 100,
        "sparsity_cdf": "upper",
        "sparsity_match": "rank",
        "sparsity_genes": "shared",
        "support": "frozen",
        "stopping": "relative",
        "split": "none",
    },
    "reference": {
        "graph_space": "counts",
        "bandwidth": "cross",
        "n_bandwidth_pairs": 100,
        "sparsity_cdf": "linspace",
        "sparsity_match": "argsort",
        "sparsity_genes": "all",
        "support": "redrawn",
        "stopping": "absolute",
        "split": "stripes",
    },
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("default", "paper", "reference"),
    "graph_space": ("scaled", "counts"),
    "search": ("exact", "approximate"),
    "bandwidth": ("pairs", "cross"),
    "sparsity_cdf": ("midrank", "upper", "linspace"),
    "sparsity_match": ("rank", "argsort"),
    "sparsity_genes": ("shared", "all"),
    "support": ("frozen", "largest", "redrawn"),
    "stopping": ("relative", "absolute"),
    "split": ("none", "stripes"),
    "storage": ("float32", "float16"),
    "diffuse": ("counts", "embedding"),
}


@dataclass(frozen=True)
class PropagationConfig:
    """LLOKI-FP: graph, sparsity target, propagation, diffusion.

    `mode` decides every field that is not given: `default` is correct and deterministic, `paper` the equations as
    printed, `reference` the behaviour of the published code with random parts drawn from the same distribution.
    (A changed mode needs new settings: `dataclasses.replace` keeps the fields that the old mode decided.)

    Neighbours: `graph_space` is where they are searched: `scaled` is the first `n_components` principal components of
    z-scored log counts over every gene of the panel; `counts` is the counts over the genes shared with the reference,
    as published. `search` is `exact`, or `approximate` by nearest-neighbour descent, which slices of `approximate_from`
    cells or more use whatever `search` says (0: never), and which records its measured recall.
    `bandwidth` σ: mean distance of `n_bandwidth_pairs` random `pairs`, or of 100 × 100 `cross` distances drawn anew
    for each graph.

    Sparsity: `sparsity_cdf` is F of equation 3: `midrank`, `upper` (i/n) or `linspace` ((i − 1)/(n − 1)); targets are
    assigned by `rank`, or by `argsort` as published; sparsity of the reference counts the `shared` genes or `all`.

    Propagation: `support` is which genes a full cell keeps: `frozen` (drawn once), `largest` values, or `redrawn` in
    every iteration; `stopping` on the `relative` change (`tolerance`) or on an `absolute` norm of 15 on counts divided
    by their maximum. `split` cuts large slices into `stripes` along x. `storage` is the type of propagated values.

    Diffusion: `alpha` weighs the diffused values against the cell's own (equation 5); `keep_observed` leaves observed
    values as they are; `cap_final` keeps a cell's largest values up to its target; `diffuse` the `counts` before the
    embedder or the `embedding` after it.
    """

    mode: Literal["default", "paper", "reference"] = "default"
    graph_space: Literal["scaled", "counts"] | None = None
    n_components: int = 20
    n_neighbors: int = 40
    search: Literal["exact", "approximate"] = "exact"
    approximate_from: int = 0
    self_loops: bool = True
    bandwidth: Literal["pairs", "cross"] | None = None
    n_bandwidth_pairs: int = 0
    sparsity_cdf: Literal["midrank", "upper", "linspace"] | None = None
    sparsity_match: Literal["rank", "argsort"] | None = None
    sparsity_genes: Literal["shared", "all"] | None = None
    support: Literal["frozen", "largest", "redrawn"] | None = None
    stopping: Literal["relative", "absolute"] | None = None
    max_iterations: int = 40
    tolerance: float = 1e-3
    split: Literal["none", "stripes"] | None = None
    storage: Literal["float32", "float16"] = "float32"
    diffuse: Literal["counts", "embedding"] = "counts"
    alpha: float = 1.0
    keep_observed: bool = False
    cap_final: bool = False
    random_state: int = 0

    def __post_init__(self) -> None:
        require(self.mode in _MODES, "mode", self.mode, "'default', 'paper' or 'reference'")
        for name, value in _MODES[self.mode].items():
            if getattr(self, name) in (None, 0):
                object.__setattr__(self, name, value)
        for name, choices in _CHOICES.items():
            require(getattr(self, name) in choices, name, getattr(self, name), "one of " + ", ".join(choices))
        require(self.n_neighbors >= 1, "n_neighbors", self.n_neighbors, "at least 1")
        require(self.n_components >= 1, "n_components", self.n_components, "at least 1")
        require(self.approximate_from >= 0, "approximate_from", self.approximate_from, "not negative")
        require(self.max_iterations >= 1, "max_iterations", self.max_iterations, "at least 1")
        require(self.tolerance > 0, "tolerance", self.tolerance, "positive")
        require(0.0 <= self.alpha <= 1.0, "alpha", self.alpha, "between 0 and 1")
        require(
            self.support != "frozen" or self.stopping == "relative",
            "stopping",
            self.stopping,
            "'relative' with a frozen support, which settles; give support='redrawn' or 'largest' with 'absolute'",
        )
        require(self.n_bandwidth_pairs >= 1, "n_bandwidth_pairs", self.n_bandwidth_pairs, "at least 1")

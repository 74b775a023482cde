"""What a catalog holds: for each slice whether the output of a stage is done, missing or stale, and why.

The receipt of an object says what it was made of; where that is not what it would be made of now, the difference is the
reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from lloki_atlas.errors import FormatError, NotFoundError
from lloki_atlas.stages.adapt_tasks import autoencoder_of
from lloki_atlas.stages.encoders import choose_encoders, held_tokens
from lloki_atlas.stages.lineage import (
    AUTOENCODER,
    MADE_OF,
    STAGES,
    Recipe,
    atlas_config,
    compare_keys,
    expectation,
    model_recipe,
    token_name,
)
from lloki_atlas.stages.train import checkpoint_description
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.objects import read_receipt
from lloki_atlas.store.records import STAGE_KINDS, SliceRecord

NOT_RUN = "not run yet"

# of a key, to tell models apart by eye
SHORT = 8
# part of a recipe → what to call another one; the output of a stage before it is called by that stage's reason
_INPUTS = {
    "slice": "the source changed",
    "reference": "another reference",
    "tile": "new statistics of the slice",
    "propagate": "a new graph",
    "embed": "a new 512-d embedding",
    "panel": "new panel data",
}
# stage → part of its recipe that is the output of another stage → that stage
_UPSTREAM = {
    "propagate": {"tile": "tile"},
    "embed": {"propagate": "propagate", "panel": "reference"},
    "integrate": {"embed": "embed"},
}
# receipts without a recipe name their inputs only: lineage name → name in the recipe
_EARLIER = {
    "tile": {"slice": "slice", "reference": "reference"},
    "reference": {"reference": "reference", "panel": "panel"},
    "propagate": {"statistics": "tile"},
    "embed": {"graph": "propagate", "panel": "panel"},
    "integrate": {"embedding": "embed", "model": "model"},
}
_SECTIONS = {"tile": "propagation", "propagate": "propagation", "embed": "propagation", "train": "autoencoder"}


def status(catalog: Catalog) -> dict[str, Any]:
    """Say what the catalog holds: version, cells, models, and for each slice the state of every stage and why.

    Parameters
    ----------
    catalog
        At any version.

    Returns
    -------
    `version`, `n_cells`; `autoencoder`, its key, `autoencoder_status` ("done", "missing" or "stale": the next run
    trains it again and encodes every slice with it) and `autoencoder_reason`; `tokens`, name to key; and `slices`, for
    each its id, technology, organism and size, `stages`, state by stage, `reasons`, a sentence for every stage that is
    not done, and `autoencoder` and `token`, the first 8 characters of the keys of the models that its 128-d embedding
    was made with; `token` is None where the autoencoder knows the platform itself.
    """
    records = [catalog.state.slices[name] for name in sorted(catalog.state.slices)]
    expected, models = expectation(catalog), _models(catalog)
    described = []
    for record in records:
        keys, recipes = expected(record)
        stages = compare_keys(record, keys)
        described.append(
            {
                "slice_id": record.slice_id,
                "technology": record.technology,
                "organism": record.organism,
                "n_cells": record.n_cells,
                "n_genes": record.n_genes,
                "stages": stages,
                "reasons": _reasons(catalog, record, stages, recipes, models),
                **_encoded_by(catalog, record, done=stages["integrate"] == "done", recipes=recipes, models=models),
            }
        )
    state, reason = _autoencoder_state(catalog)
    return {
        "version": catalog.version,
        "n_cells": sum(record.n_cells for record in records),
        "autoencoder": catalog.state.models.get(AUTOENCODER),
        "autoencoder_status": state,
        "autoencoder_reason": reason,
        "tokens": held_tokens(catalog),
        "slices": described,
    }


class _Models(NamedTuple):
    """What models are, read once for all slices: the autoencoder of a key, the names that have a token."""

    base_of: Callable[[str], str]
    known: Callable[[], frozenset[str]]
    token_by: str


def _models(catalog: Catalog) -> _Models:
    @cache
    def base_of(key: str) -> str:
        return autoencoder_of(catalog, key)

    @cache
    def known() -> frozenset[str]:
        key = catalog.state.models.get(AUTOENCODER)
        own = [] if key is None else checkpoint_description(catalog, key)["platforms"]
        return frozenset([*own, *held_tokens(catalog)])

    return _Models(base_of, known, atlas_config(catalog).autoencoder.token_by)


def _reasons(
    catalog: Catalog,
    record: SliceRecord,
    stages: Mapping[str, str],
    recipes: Mapping[str, Recipe],
    models: _Models,
) -> dict[str, str]:
    """A sentence for every stage that is not done, in the order of the stages."""
    reasons: dict[str, str] = {}
    for stage in STAGES:
        if stages[stage] == "missing":
            reasons[stage] = _why_missing(record, stage, recipes, models)
        elif stages[stage] == "stale" and stage not in recipes:
            reasons[stage] = "the atlas has no autoencoder any more"
        elif stages[stage] == "stale":
            held = catalog.path(STAGE_KINDS[stage], record.objects[stage])
            reasons[stage] = _why_stale(catalog, stage, held, recipes[stage], reasons)
    return reasons


def _why_missing(record: SliceRecord, stage: str, recipes: Mapping[str, Recipe], models: _Models) -> str:
    if stage not in recipes:
        return "the atlas has no autoencoder yet"
    if stage == "integrate" and token_name(record, models.token_by) not in models.known():
        return "the autoencoder does not know its platform: adapt it, or train it anew"
    return NOT_RUN


def _why_stale(catalog: Catalog, stage: str, held: Any, now: Recipe, upstream: Mapping[str, str]) -> str:
    try:
        lineage = read_receipt(held).lineage
    except (FormatError, NotFoundError) as error:
        return f"made of something else; {error}"
    made = lineage.get(MADE_OF)
    if made is None:
        names = _EARLIER.get(stage, {})
        made = {names[name]: value for name, value in lineage.items() if name in names}
        now = {name: value for name, value in now.items() if name in made}
    found = list(differences(catalog, stage, made, now, upstream))
    return "; ".join(found) or "settings or the stage's version changed (its receipt is too old to say which)"


def differences(
    catalog: Catalog, stage: str, made: Mapping[str, Any], now: Mapping[str, Any], upstream: Mapping[str, str]
) -> Iterator[str]:
    """Say what is not as it was.

    Parameters
    ----------
    catalog
        Holds the models that are named.
    stage
        Whose output it is.
    made, now
        What the output was made of, and what it would be made of.
    upstream
        Why the outputs of earlier stages are not what they were, by stage.
    """
    section = _SECTIONS.get(stage, stage)
    for name in dict.fromkeys((*now, *made)):
        old, new = made.get(name), now.get(name)
        if old == new:
            continue
        if name == "version":
            yield f"stage version {old} → {new}"
        elif name == "settings":
            yield from _changed_settings(section, old or {}, new or {})
        elif name == "model":
            yield _another_model(catalog, old, new)
        elif name == "embedder":
            yield "the embedder changed"
        elif name == "embeddings":
            yield "embeddings that it was trained on changed"
        elif stage == "reference" and name == "panel":
            yield "the slice's genes changed"
        elif name in _INPUTS:
            because = upstream.get(_UPSTREAM.get(stage, {}).get(name, ""))
            yield _INPUTS[name] + (f" ({because})" if because else "")
        else:
            yield from _changed_settings(section, {name: old}, {name: new})


def _changed_settings(section: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys((*new, *old)):
        if old.get(name) != new.get(name):
            yield f"{section}.{name} changed from {old.get(name)} to {new.get(name)}"


def _another_model(catalog: Catalog, old: str | None, new: str | None) -> str:
    tokens = set(held_tokens(catalog).values())
    if new in tokens:
        return "a new token of its platform"
    return "a new autoencoder" if old is not None else "an autoencoder"


def _autoencoder_state(catalog: Catalog) -> tuple[str, str | None]:
    """Whether the next run trains the autoencoder again, and why."""
    key = catalog.state.models.get(AUTOENCODER)
    if key is None:
        return "missing", "not trained yet"
    encoders = choose_encoders(catalog, [])
    if not encoders.train:
        return "done", None
    expected = expectation(catalog)
    embeddings = {name: expected(catalog.slice(name)).keys["embed"] for name in encoders.slices}
    now = model_recipe(atlas_config(catalog), embeddings, encoders.label_key)
    made = read_receipt(catalog.path("models", key)).lineage.get(MADE_OF)
    if made is None:
        lineage = checkpoint_description(catalog, key)["lineage"]
        made = {**now, "embeddings": lineage["slices"]}
    found = "; ".join(differences(catalog, "train", made, now, {}))
    return "stale", found or "its settings or the stage's version changed (its receipt is too old to say which)"


def _encoded_by(
    catalog: Catalog, record: SliceRecord, *, done: bool, recipes: Mapping[str, Recipe], models: _Models
) -> dict[str, str | None]:
    held = record.objects.get("integrate")
    key: str | None = None
    if held is not None and done:
        key = recipes["integrate"]["model"]
    elif held is not None:  # of an earlier model
        key = read_receipt(catalog.path("embeddings", held)).lineage.get("model")
    if key is None:
        return {"autoencoder": None, "token": None}
    base = models.base_of(key)
    return {"autoencoder": base[:SHORT], "token": None if base == key else key[:SHORT]}

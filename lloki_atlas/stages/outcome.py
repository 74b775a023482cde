"""What a run leaves: the objects that are there are committed, and what their steps handed on goes."""

from __future__ import annotations

import dataclasses

from lloki_atlas.stages.encoders import Encoders, held_tokens
from lloki_atlas.stages.lineage import AUTOENCODER, TOKEN_ROLE
from lloki_atlas.store.catalog import Catalog, commit
from lloki_atlas.store.durable import remove_tree
from lloki_atlas.store.objects import is_complete
from lloki_atlas.store.places import Place
from lloki_atlas.store.records import STAGE_KINDS, Change

Keys = dict[str, dict[str, str]]  # slice id → stage → key


def commit_run(catalog: Catalog, chosen: Keys, encoders: Encoders | None) -> Catalog:
    """Record every object of the chosen slices that is on disk now; nothing new, no new version."""
    slices, handed_on = {}, []
    for name, keys in chosen.items():
        record = catalog.slice(name)
        held = {stage: key for stage, key in keys.items() if is_complete(catalog.path(STAGE_KINDS[stage], key))}
        handed_on += [held[stage] for stage in ("propagate", "embed", "integrate") if stage in held]
        if {**record.objects, **held} != dict(record.objects):
            slices[name] = dataclasses.replace(record, objects={**record.objects, **held})
    models = _changed_models(catalog, encoders) if encoders is not None else {}
    clean_up(catalog, *handed_on, *(key for key in models.values() if key is not None))
    if not slices and not models:
        return catalog
    return commit(catalog, Change(slices=slices, models=models), message=f"run: {len(slices)} slices")


def clean_up(catalog: Catalog, *keys: str) -> None:
    """Remove what the steps towards finished objects handed on to each other in the staging area."""
    staging = catalog.root / "staging"
    if not keys or not staging.is_dir():
        return
    finished = set(keys)
    entries: list[Place] = list(staging.iterdir())
    for left in entries:
        key, dot, _ = left.name.partition(".")
        if not dot or key not in finished:
            continue
        if left.is_dir():
            remove_tree(left)
        else:
            left.unlink(missing_ok=True)


def _changed_models(catalog: Catalog, encoders: Encoders) -> dict[str, str | None]:
    """The models that a run leaves: a token goes with the autoencoder that it belongs to."""
    if not is_complete(catalog.path("models", encoders.key)):
        return {}
    models: dict[str, str | None] = {AUTOENCODER: encoders.key}
    if catalog.state.models.get(AUTOENCODER) != encoders.key:
        models |= {TOKEN_ROLE + name: None for name in held_tokens(catalog)}
    for name, token in encoders.tokens.items():
        if is_complete(catalog.path("models", token.key)):
            models[TOKEN_ROLE + name] = token.key
    if all(catalog.state.models.get(role) == key for role, key in models.items()):
        return {}
    # the autoencoder is named even where it stays: whoever replaces it meanwhile is in conflict with its new tokens
    return {role: key for role, key in models.items() if role == AUTOENCODER or catalog.state.models.get(role) != key}

"""The public verbs over the stages: plan, run, train, status.

A plan holds only what is missing or stale; running it twice does nothing the second time, and running it after a kill
continues, because every object on disk is found by its content key.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

from lloki_atlas.config import to_dict
from lloki_atlas.engine.outputs import Output
from lloki_atlas.engine.plan import Outcome, Plan, Task, link
from lloki_atlas.errors import InputError
from lloki_atlas.stages import adapt_tasks, embed_tasks, integrate, propagate_tasks, reference, streaming, tile, train
from lloki_atlas.stages.encoders import Encoders, atlas_slices, choose_encoders, held_tokens
from lloki_atlas.stages.lineage import (
    AUTOENCODER,
    STAGES,
    TOKEN_ROLE,
    atlas_config,
    encoder_key,
    expected_objects,
    integrate_key,
    stage_status,
    token_name,
)
from lloki_atlas.store.catalog import Catalog, commit
from lloki_atlas.store.objects import is_complete, read_receipt
from lloki_atlas.store.records import STAGE_KINDS, Change, SliceRecord

# of a key, to tell models apart by eye
SHORT = 8

Keys = dict[str, dict[str, str]]  # slice id → stage → key


def plan(
    catalog: Catalog,
    *,
    slices: Iterable[str] | None = None,
    until: str = "integrate",
    train_on: Iterable[str] | None = None,
    label_key: str | None = None,
    adapt_on: Iterable[str] | None = None,
    adapt_seed: int | None = None,
    device_memory_mb: int | None = None,
) -> Plan:
    """Plan everything that is missing or stale.

    Parameters
    ----------
    catalog
        Opened with mode "r+" to run the plan, "r" to look at it.
    slices
        Slice ids; all slices when None.
    until
        Last stage to run.
    train_on
        Slices to train the autoencoder on anew. When None it is trained on all of `slices` if the atlas has none yet,
        trained again on its own slices if their embeddings or its settings have changed, and left alone otherwise.
    label_key
        Column of cell types that refines the pairs of a first training; None trains without labels.
    adapt_on
        Slices of platforms that the autoencoder does not know, to adapt it to: a token of its own is trained for each
        platform. Tokens that the atlas has already are adapted again if their embeddings or the autoencoder changed.
    adapt_seed
        Seed of these tokens; when None, that of the token a platform has already, else that of the atlas.
    device_memory_mb
        Most that this run takes of a GPU, in 2^20 bytes; what the settings of the embedder say when None.

    Returns
    -------
    A plan; `plan(...).run(client)` runs it and commits one version.

    Raises
    ------
    InputError
        If the stage does not exist, the catalog has no reference, or the encoder knows no token for a slice's panel.
    NotFoundError
        If a slice does not exist.
    """
    if until not in STAGES:
        raise InputError(f"there is no stage '{until}': choose from {', '.join(STAGES)}")
    if catalog.state.reference is None:
        raise InputError(f"{catalog.root} has no reference yet: create the catalog with one")
    names = sorted(catalog.state.slices) if slices is None else sorted(set(slices))
    records = {name: catalog.slice(name) for name in names}
    wanted = STAGES[: STAGES.index(until) + 1]
    encoders = None
    if "integrate" in wanted and records:
        encoders = choose_encoders(
            catalog, names, train_on=train_on, label_key=label_key, adapt_on=adapt_on, random_state=adapt_seed
        )
    read = (
        {name: catalog.slice(name) for name in encoders.trained_on if name in catalog.state.slices} if encoders else {}
    )
    keys = {name: expected_objects(catalog, record) for name, record in {**read, **records}.items()}

    tasks: dict[str, Task] = {}
    digest = _embedder_digest(catalog)
    for name, record in {**read, **records}.items():
        encoding = _encoding(catalog, record, keys[name], encoders) if name in records else None
        for task in _slice_tasks(catalog, record, keys[name], wanted, digest, device_memory_mb, encoding):
            tasks.setdefault(task.name, task)
    if encoders is not None:
        for task in _model_tasks(catalog, encoders, keys):
            tasks[task.name] = task
        for name, record in records.items():
            key = encoders.key_of(_token_name(catalog, record))
            keys[name]["integrate"] = integrate_key(keys[name]["embed"], key)
            encoded_by = tuple(task.name for task in tasks.values() if task.slice_id == name and task.also)
            for task in integrate.plan_stage(catalog, record, keys[name], model_key=key, encoded_by=encoded_by):
                tasks[task.name] = task
    missing = [task for task in tasks.values() if not is_complete(task.output.path)]
    chosen = {name: {stage: keys[name][stage] for stage in wanted} for name in records}
    return Plan(link(missing), commit=lambda outcome: _commit(catalog, chosen, encoders, outcome))


def run(
    catalog: Catalog,
    *,
    client: Any = None,
    progress: bool = True,
    n_workers: int | None = None,
    n_gpus: int | None = None,
    **choice: Any,
) -> Catalog:
    """Plan and run; `choice` is passed on to `plan`. Returns the catalog at the version that holds the results."""
    if catalog.mode == "r":
        raise InputError(f"{catalog.root} is open for reading: open it with mode='r+' to run")
    return plan(catalog, **choice).run(client, progress=progress, n_workers=n_workers, n_gpus=n_gpus)


def train_autoencoder(
    catalog: Catalog,
    *,
    slices: Iterable[str] | None = None,
    label_key: str | None = None,
    random_state: int | None = None,
    search: bool | None = None,
    client: Any = None,
    progress: bool = True,
    n_workers: int | None = None,
    n_gpus: int | None = None,
    device_memory_mb: int | None = None,
) -> Catalog:
    """Train the autoencoder anew, on all slices or on some, and encode the whole atlas with it.

    Parameters
    ----------
    catalog
        Opened with mode "r+".
    slices
        Slices to train on; all when None. Every panel of the atlas has to be among theirs, but for those that have a
        token: the new autoencoder is adapted to these again.
    label_key
        Column of cell types that refines positives and negatives.
    random_state
        Seed; the atlas's own when None.
    search
        Whether to choose the conservation weight and the number of epochs on held-out cells; as the atlas says when
        None.
    client, progress, n_workers, n_gpus
        As for `Plan.run`.
    device_memory_mb
        As for `plan`.

    Returns
    -------
    The catalog at the version that holds the new model and the new 128-d embeddings.
    """
    chosen = sorted(catalog.state.slices) if slices is None else sorted(set(slices))
    given: dict[str, Any] = {"random_state": random_state, "search": search}
    asked = {name: value for name, value in given.items() if value is not None}
    if asked:
        config = atlas_config(catalog)
        autoencoder = dataclasses.replace(config.autoencoder, **asked)
        change = Change(config=to_dict(dataclasses.replace(config, autoencoder=autoencoder)))
        # what the run would refuse is refused before the settings become a version
        plan(dataclasses.replace(catalog, state=catalog.state.apply(change)), train_on=chosen, label_key=label_key)
        catalog = commit(catalog, change, message="autoencoder " + ", ".join(f"{n} {v}" for n, v in asked.items()))
    return run(
        catalog,
        client=client,
        progress=progress,
        n_workers=n_workers,
        n_gpus=n_gpus,
        train_on=chosen,
        label_key=label_key,
        device_memory_mb=device_memory_mb,
    )


def _model_tasks(catalog: Catalog, encoders: Encoders, keys: Keys) -> Iterator[Task]:
    """The tasks that train what encodes a run."""
    if encoders.train:
        records = [catalog.slice(name) for name in encoders.slices]
        yield train.plan_training(catalog, records, keys, model_key=encoders.key, label_key=encoders.label_key)
    atlas = [catalog.slice(name) for name in atlas_slices(catalog, encoders)]
    for name, token in encoders.tokens.items():
        if token.adapt:
            yield adapt_tasks.plan_adaptation(
                catalog,
                [catalog.slice(slice_id) for slice_id in token.slices],
                atlas,
                keys,
                platform=name,
                token_key=token.key,
                model_key=encoders.key,
                label_key=encoders.label_key,
                random_state=token.random_state,
            )


def _token_name(catalog: Catalog, record: SliceRecord) -> str:
    return token_name(record, atlas_config(catalog).autoencoder.token_by)


def _encoding(
    catalog: Catalog, record: SliceRecord, keys: dict[str, str], encoders: Encoders | None
) -> tuple[dict[str, str], Output] | None:
    """How the tasks that embed a slice encode it as well: with a model that is there, from a device."""
    config, name = atlas_config(catalog), _token_name(catalog, record)
    if encoders is None or not encoders.is_ready(name) or config.propagation.diffuse != "counts":
        return None
    if not streaming.uses_device(config.embedder):
        return None
    key = encoders.key_of(name)
    keys = {**keys, "integrate": integrate_key(keys["embed"], key)}
    if any(is_complete(catalog.path("embeddings", keys[stage])) for stage in ("embed", "integrate")):
        return None
    return integrate.plan_encoding(catalog, record, keys, model_key=key)


def _slice_tasks(
    catalog: Catalog,
    record: SliceRecord,
    keys: dict[str, str],
    wanted: tuple[str, ...],
    embedder_digest: str,
    device_memory_mb: int | None,
    encoding: tuple[dict[str, str], Output] | None,
) -> Iterator[Task]:
    if "tile" in wanted:
        yield from tile.plan_stage(catalog, record, keys)
    if "reference" in wanted:
        yield from reference.plan_stage(catalog, record, keys)
    if "propagate" in wanted:
        yield from propagate_tasks.plan_stage(catalog, record, keys)
    if "embed" in wanted:
        yield from embed_tasks.plan_stage(
            catalog,
            record,
            keys,
            embedder_digest=embedder_digest,
            device_memory_mb=device_memory_mb,
            encoding=encoding,
        )


def _embedder_digest(catalog: Catalog) -> str:
    path = catalog.path("models", catalog.state.models["embedder"]) / "embedder.json"
    return str(json.loads(path.read_bytes())["digest"])


def _commit(catalog: Catalog, chosen: Keys, encoders: Encoders | None, outcome: Outcome) -> Catalog:
    """Record every object that is on disk now; nothing new, no new version."""
    slices = {}
    for name, keys in chosen.items():
        record = catalog.slice(name)
        held = {stage: key for stage, key in keys.items() if is_complete(catalog.path(STAGE_KINDS[stage], key))}
        for stage in ("propagate", "embed", "integrate"):
            if stage in held:
                clean_up(catalog, held[stage])
        if {**record.objects, **held} != dict(record.objects):
            slices[name] = dataclasses.replace(record, objects={**record.objects, **held})
    models = _changed_models(catalog, encoders) if encoders is not None else {}
    if not slices and not models:
        return catalog
    return commit(catalog, Change(slices=slices, models=models), message=f"run: {len(slices)} slices")


def _changed_models(catalog: Catalog, encoders: Encoders) -> dict[str, str | None]:
    """The models that a run leaves: a token goes with the autoencoder that it belongs to."""
    if not is_complete(catalog.path("models", encoders.key)):
        return {}
    clean_up(catalog, encoders.key)
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


def clean_up(catalog: Catalog, key: str) -> None:
    """Remove what the steps towards a finished object handed on to each other in the staging area."""
    staging = catalog.path("staging", key)
    for left in staging.parent.glob(f"{staging.name}.*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def status(catalog: Catalog) -> dict[str, Any]:
    """Say what the catalog holds: version, cells, models, and for each slice the state of every stage.

    `autoencoder` and `token` of a slice are the first 8 characters of the keys of the models that its 128-d embedding
    was made with; `token` is None where the autoencoder knows the platform itself.
    """
    records = [catalog.state.slices[name] for name in sorted(catalog.state.slices)]
    return {
        "version": catalog.version,
        "n_cells": sum(record.n_cells for record in records),
        "autoencoder": catalog.state.models.get(AUTOENCODER),
        "tokens": held_tokens(catalog),
        "slices": [
            {
                "slice_id": record.slice_id,
                "technology": record.technology,
                "organism": record.organism,
                "n_cells": record.n_cells,
                "n_genes": record.n_genes,
                "stages": stage_status(catalog, record),
                **_encoded_by(catalog, record),
            }
            for record in records
        ],
    }


def _encoded_by(catalog: Catalog, record: SliceRecord) -> dict[str, str | None]:
    held = record.objects.get("integrate")
    if held is None:
        return {"autoencoder": None, "token": None}
    if held == expected_objects(catalog, record).get("integrate"):
        key = encoder_key(catalog, record)
    else:  # of an earlier model
        key = read_receipt(catalog.path("embeddings", held)).lineage.get("model")
    if key is None:
        return {"autoencoder": None, "token": None}
    base = adapt_tasks.autoencoder_of(catalog, key)
    return {"autoencoder": base[:SHORT], "token": None if base == key else key[:SHORT]}

"""The public verbs over the stages: plan, run, train, status.

A plan holds only what is missing or stale; running it twice does nothing the second time, and running it after a kill
continues, because every object on disk is found by its content key.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lloki_atlas.config import to_dict
from lloki_atlas.engine.plan import Outcome, Output, Plan, Task, link
from lloki_atlas.errors import InputError
from lloki_atlas.stages import embed_tasks, integrate, propagate_tasks, reference, streaming, tile, train
from lloki_atlas.stages.lineage import (
    STAGES,
    atlas_config,
    expected_objects,
    integrate_key,
    model_key,
    stage_status,
)
from lloki_atlas.store.catalog import Catalog, commit
from lloki_atlas.store.objects import is_complete
from lloki_atlas.store.records import STAGE_KINDS, Change, SliceRecord

Keys = dict[str, dict[str, str]]  # slice id → stage → key


def plan(
    catalog: Catalog,
    *,
    slices: Iterable[str] | None = None,
    until: str = "integrate",
    train_on: Iterable[str] | None = None,
    label_key: str | None = None,
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
    encode = "integrate" in wanted and bool(records)
    model = _choose_model(catalog, names, train_on, label_key) if encode else None
    trained = {name: catalog.slice(name) for name in model.slices} if model and model.train else {}
    keys = {name: expected_objects(catalog, record) for name, record in {**trained, **records}.items()}

    tasks: dict[str, Task] = {}
    digest = _embedder_digest(catalog)
    for name, record in {**trained, **records}.items():
        encoding = _encoding(catalog, record, keys[name], model) if name in records else None
        for task in _slice_tasks(catalog, record, keys[name], wanted, digest, device_memory_mb, encoding):
            tasks.setdefault(task.name, task)
    if model is not None:
        if model.train:
            task = train.plan_training(
                catalog, list(trained.values()), keys, model_key=model.key, label_key=model.label_key
            )
            tasks[task.name] = task
        for name, record in records.items():
            keys[name]["integrate"] = integrate_key(keys[name]["embed"], model.key)
            encoded_by = tuple(task.name for task in tasks.values() if task.slice_id == name and task.also)
            for task in integrate.plan_stage(catalog, record, keys[name], model_key=model.key, encoded_by=encoded_by):
                tasks[task.name] = task
    missing = [task for task in tasks.values() if not is_complete(task.output.path)]
    chosen = {name: {stage: keys[name][stage] for stage in wanted} for name in records}
    return Plan(link(missing), commit=lambda outcome: _commit(catalog, chosen, model, outcome))


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
        Slices to train on; all when None. Every panel of the atlas has to be among theirs.
    label_key
        Column of cell types that refines positives and negatives.
    random_state
        Seed; the atlas's own when None.
    client, progress, n_workers, n_gpus
        As for `Plan.run`.
    device_memory_mb
        As for `plan`.

    Returns
    -------
    The catalog at the version that holds the new model and the new 128-d embeddings.
    """
    chosen = sorted(catalog.state.slices) if slices is None else sorted(set(slices))
    if random_state is not None:
        config = atlas_config(catalog)
        autoencoder = dataclasses.replace(config.autoencoder, random_state=random_state)
        change = Change(config=to_dict(dataclasses.replace(config, autoencoder=autoencoder)))
        # what the run would refuse is refused before the seed becomes a version
        plan(dataclasses.replace(catalog, state=catalog.state.apply(change)), train_on=chosen, label_key=label_key)
        catalog = commit(catalog, change, message=f"autoencoder random_state {random_state}")
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


@dataclass(frozen=True)
class _Model:
    """Which autoencoder encodes the atlas, and whether it has to be trained first."""

    key: str
    slices: tuple[str, ...]
    label_key: str | None
    train: bool


def _choose_model(catalog: Catalog, names: list[str], train_on: Iterable[str] | None, label_key: str | None) -> _Model:
    current = catalog.state.models.get("autoencoder")
    if current is None or train_on is not None:
        model = _new_model(catalog, names if train_on is None else sorted(set(train_on)), label_key)
    else:
        description = train.checkpoint_description(catalog, current)
        trained = description["lineage"]["slices"]
        label_key = description["lineage"]["label_key"]
        # a slice that has left the atlas stays what the model was made of
        embeddings = {n: _embed_key(catalog, n) if n in catalog.state.slices else key for n, key in trained.items()}
        if model_key(atlas_config(catalog), embeddings, label_key) == current:
            _check_platforms(catalog, names, known=description["platforms"])
            return _Model(current, tuple(trained), label_key, train=False)
        model = _new_model(catalog, [name for name in trained if name in catalog.state.slices], label_key)
    platforms = [train.platform_name(catalog.slice(name)) for name in model.slices]
    _check_platforms(catalog, names if model.slices else [], known=platforms)
    return model


def _new_model(catalog: Catalog, slices: list[str], label_key: str | None) -> _Model:
    key = model_key(atlas_config(catalog), {name: _embed_key(catalog, name) for name in slices}, label_key)
    return _Model(key, tuple(slices), label_key, train=True)


def _check_platforms(catalog: Catalog, names: list[str], *, known: list[str]) -> None:
    for name in names:
        record = catalog.slice(name)
        if train.platform_name(record) not in known:
            raise InputError(
                f"the encoder has no token for slice '{name}' ({record.technology}, a new panel): train it anew with "
                "`lloki-atlas train` on slices of every panel, or stop at the 512-d embedding with until='embed'"
            )


def _embed_key(catalog: Catalog, slice_id: str) -> str:
    return expected_objects(catalog, catalog.slice(slice_id))["embed"]


def _encoding(
    catalog: Catalog, record: SliceRecord, keys: dict[str, str], model: _Model | None
) -> tuple[dict[str, str], Output] | None:
    """How the tasks that embed a slice encode it as well: with a model that is there, from a device."""
    config = atlas_config(catalog)
    if model is None or model.train or config.propagation.diffuse != "counts":
        return None
    if not streaming.uses_device(config.embedder):
        return None
    keys = {**keys, "integrate": integrate_key(keys["embed"], model.key)}
    if any(is_complete(catalog.path("embeddings", keys[stage])) for stage in ("embed", "integrate")):
        return None
    return integrate.plan_encoding(catalog, record, keys, model_key=model.key)


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


def _commit(catalog: Catalog, chosen: Keys, model: _Model | None, outcome: Outcome) -> Catalog:
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
    models = {}
    if model is not None and is_complete(catalog.path("models", model.key)):
        models["autoencoder"] = model.key
    if models == {"autoencoder": catalog.state.models.get("autoencoder")}:
        models = {}
    if not slices and not models:
        return catalog
    return commit(catalog, Change(slices=slices, models=models), message=f"run: {len(slices)} slices")


def clean_up(catalog: Catalog, key: str) -> None:
    """Remove what the steps towards a finished object handed on to each other in the staging area."""
    staging = catalog.path("staging", key)
    for left in staging.parent.glob(f"{staging.name}.*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def status(catalog: Catalog) -> dict[str, Any]:
    """Say what the catalog holds: version, cells, and for each slice the state of every stage."""
    records = [catalog.state.slices[name] for name in sorted(catalog.state.slices)]
    return {
        "version": catalog.version,
        "n_cells": sum(record.n_cells for record in records),
        "slices": [
            {
                "slice_id": record.slice_id,
                "technology": record.technology,
                "organism": record.organism,
                "n_cells": record.n_cells,
                "n_genes": record.n_genes,
                "stages": stage_status(catalog, record),
            }
            for record in records
        ],
    }

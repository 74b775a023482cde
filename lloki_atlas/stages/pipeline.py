"""The public verbs over the stages: plan, run, train.

A plan holds only what is missing or stale; running it twice does nothing the second time, and running it after a kill
continues, because every object on disk is found by its content key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lloki_atlas.config import digest, to_dict
from lloki_atlas.engine.outputs import Output
from lloki_atlas.engine.plan import Plan, Task, link
from lloki_atlas.errors import InputError
from lloki_atlas.stages import adapt_tasks, embed_tasks, integrate, propagate_tasks, reference, streaming, tile, train
from lloki_atlas.stages.cost import with_writes
from lloki_atlas.stages.encoders import Encoders, atlas_slices, choose_encoders
from lloki_atlas.stages.lineage import (
    AUTOENCODER,
    MADE_OF,
    STAGES,
    Expected,
    Recipe,
    atlas_config,
    expectation,
    integrate_key,
    integrate_recipe,
    model_recipe,
    token_name,
)
from lloki_atlas.stages.outcome import Keys, commit_run
from lloki_atlas.store.catalog import Catalog, commit
from lloki_atlas.store.leases import writing
from lloki_atlas.store.objects import is_complete
from lloki_atlas.store.places import Place
from lloki_atlas.store.records import STAGE_KINDS, Change, SliceRecord

# above so many slices the folders of the objects are listed rather than asked for each of them
FEW_SLICES = 16


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
    config, expected = atlas_config(catalog), expectation(catalog)
    made = {name: expected(record) for name, record in records.items()}
    there = _finished(catalog, len(names))
    encoders = None
    if "integrate" in wanted and records:
        choice = {"train_on": train_on, "label_key": label_key, "adapt_on": adapt_on, "random_state": adapt_seed}
        left = [name for name in names if not all(there(stage, made[name].keys.get(stage)) for stage in wanted)]
        encoders = _choose_encoders(catalog, names, left, **choice)
        for name, record in records.items():
            _encode_with(made[name], encoders.key_of(token_name(record, config.autoencoder.token_by)))
    read = [] if encoders is None else [name for name in encoders.trained_on if name in catalog.state.slices]
    read = [name for name in read if name not in made]
    made |= {name: expected(catalog.slice(name)) for name in read}
    # what is finished is not looked at again: a slice more costs an atlas of a thousand what it costs one of ten
    left = [name for name in names if not all(there(stage, made[name].keys[stage]) for stage in wanted)]
    keys = {name: part.keys for name, part in made.items()}

    tasks: dict[str, Task] = {}
    embedder = _embedder_digest(catalog)
    for name in [*read, *left]:
        record = catalog.slice(name)
        encoding = _encoding(catalog, record, keys[name], encoders) if name in records else None
        for task in _slice_tasks(catalog, record, keys[name], wanted, embedder, device_memory_mb, encoding):
            tasks.setdefault(task.name, task)
    if encoders is not None:
        for task in _model_tasks(catalog, encoders, keys):
            tasks[task.name] = task
        for name in left:
            key = encoders.key_of(token_name(records[name], config.autoencoder.token_by))
            encoded_by = tuple(task.name for task in tasks.values() if task.slice_id == name and task.also)
            for task in integrate.plan_stage(catalog, records[name], keys[name], model_key=key, encoded_by=encoded_by):
                tasks[task.name] = task
    missing = [task for task in tasks.values() if not is_complete(task.output.path)]
    recipes = _recipes_by_path(catalog, [made[name] for name in (*read, *left)], encoders, keys)
    told = [_with_recipe(with_writes(catalog, config, task), recipes) for task in missing]
    unfinished = set(left)
    chosen = {
        name: {stage: keys[name][stage] for stage in wanted}
        for name in names
        if name in unfinished or any(records[name].objects.get(stage) != keys[name][stage] for stage in wanted)
    }
    return Plan(
        link(told),
        commit=lambda _: commit_run(catalog, chosen, encoders),
        lease=lambda: writing(catalog.root, "run"),
    )


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
        autoencoder = replace(config.autoencoder, **asked)
        change = Change(config=to_dict(replace(config, autoencoder=autoencoder)))
        # what the run would refuse is refused before the settings become a version
        plan(replace(catalog, state=catalog.state.apply(change)), train_on=chosen, label_key=label_key)
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


def _choose_encoders(catalog: Catalog, names: list[str], left: list[str], **choice: Any) -> Encoders:
    """What encodes a run; slices that are finished have a say only where a model is trained anew."""
    if AUTOENCODER in catalog.state.models and choice["train_on"] is None and choice["adapt_on"] is None:
        chosen = choose_encoders(catalog, left, **choice)
        if not chosen.train:
            return chosen
    return choose_encoders(catalog, names, **choice)


def _encode_with(made: Expected, model: str) -> None:
    """Let a slice's 128-d embedding be that of a model."""
    if made.recipes.get("integrate", {}).get("model") != model:
        made.recipes["integrate"] = integrate_recipe(made.keys["embed"], model)
        made.keys["integrate"] = digest(made.recipes["integrate"])


def _finished(catalog: Catalog, n_slices: int) -> Callable[[str, str | None], bool]:
    """Return a function of a stage and a key: whether that output is there."""
    listed: dict[str, set[str]] = {}

    def there(stage: str, key: str | None) -> bool:
        if key is None:
            return False
        kind = STAGE_KINDS[stage]
        if n_slices <= FEW_SLICES:
            return is_complete(catalog.path(kind, key))
        if kind not in listed:
            listed[kind] = _names_in(catalog.path(kind, key).parent)
        return f"{key}.zarr" in listed[kind] and f"{key}.zarr.json" in listed[kind]

    return there


def _names_in(folder: Place) -> set[str]:
    if not folder.is_dir():
        return set()
    # names alone: a path for each of thousands of objects takes ten times as long
    return set(os.listdir(folder)) if isinstance(folder, Path) else {entry.name for entry in folder.iterdir()}  # noqa: PTH208


def _recipes_by_path(
    catalog: Catalog, made: list[Expected], encoders: Encoders | None, keys: Keys
) -> dict[str, Recipe]:
    """What each object of a run is made of, by where it goes."""
    recipes = {
        str(catalog.path(STAGE_KINDS[stage], part.keys[stage])): recipe
        for part in made
        for stage, recipe in part.recipes.items()
    }
    if encoders is not None and encoders.train:
        embeddings = {name: keys[name]["embed"] for name in encoders.slices}
        recipe = model_recipe(atlas_config(catalog), embeddings, encoders.label_key)
        recipes[str(catalog.path("models", encoders.key))] = recipe
    return recipes


def _with_recipe(task: Task, recipes: Mapping[str, Recipe]) -> Task:
    """Let receipts say what the objects are made of."""

    def told(output: Output) -> Output:
        recipe = recipes.get(output.path)
        return output if recipe is None else replace(output, lineage={**output.lineage, MADE_OF: recipe})

    return replace(task, output=told(task.output), also=tuple(map(told, task.also)))


def _encoding(
    catalog: Catalog, record: SliceRecord, keys: dict[str, str], encoders: Encoders | None
) -> tuple[dict[str, str], Output] | None:
    """How the tasks that embed a slice encode it as well: with a model that is there, from a device."""
    config = atlas_config(catalog)
    name = token_name(record, config.autoencoder.token_by)
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

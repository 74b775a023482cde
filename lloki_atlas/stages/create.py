"""Make a catalog: settings, the embedder's description, and the scRNA-seq reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lloki_atlas.config import AtlasConfig, EmbedderConfig, canonical_json, digest, to_dict
from lloki_atlas.errors import InputError
from lloki_atlas.models.embedders import embedder_factory
from lloki_atlas.stages.reference import fit_reference
from lloki_atlas.store.catalog import Catalog, create_store, vacant
from lloki_atlas.store.objects import is_complete
from lloki_atlas.store.places import Place
from lloki_atlas.store.publishing import own_staging, publish
from lloki_atlas.store.records import Change
from lloki_atlas.store.references import ReferenceProfile, write_reference

REFERENCE_VERSION = 1


def parse_embedder(text: str, base: EmbedderConfig | None = None) -> EmbedderConfig:
    """Read `reference`, `scgpt:DIR` or the name of a plug-in (`name` or `name:checkpoint`)."""
    name, _, checkpoint = text.partition(":")
    base = base or EmbedderConfig()
    return dataclasses.replace(base, name=name, checkpoint=checkpoint or base.checkpoint)


def create_catalog(
    location: str | Place,
    *,
    reference: Any,
    organism: str | None = None,
    label_key: str | None = None,
    layer: str | None = None,
    embedder: str | None = None,
    config: AtlasConfig | None = None,
) -> Catalog:
    """Create a catalog with its reference and embedder.

    Parameters
    ----------
    location
        A folder that does not exist yet, or is empty; or an address such as `s3://bucket/atlas`.
    reference
        scRNA-seq counts: path of an h5ad file, an AnnData, or a `ReferenceProfile`.
    organism
        `mouse` or `human`; not needed for a `ReferenceProfile`.
    label_key, layer
        As for `fit_reference`.
    embedder
        `reference`, `scgpt:DIR` or a plug-in's name; what `config` says when None.
    config
        Settings of the atlas.

    Returns
    -------
    The catalog, opened for writing.

    Raises
    ------
    InputError
        If the location is taken or the reference cannot be used.
    CheckpointError
        If the embedder's checkpoint does not fit its description.
    """
    config = config or AtlasConfig()
    if embedder is not None:
        config = dataclasses.replace(config, embedder=parse_embedder(embedder, config.embedder))
    config = located(config)
    catalog = vacant(location)
    embedder_digest = embedder_factory(config.embedder.name).digest(config.embedder)
    if isinstance(reference, ReferenceProfile):
        profile = reference
    elif organism is None:
        raise InputError("say the organism of the reference: organism='mouse' or 'human'")
    else:
        profile = fit_reference(
            reference, organism=organism, label_key=label_key, layer=layer, n_factors=config.embedder.n_factors
        )
    # everything that can be refused has been; from here on only the disk can fail
    change = Change(
        config=to_dict(config),
        reference=_write_reference(catalog, profile),
        models={"embedder": write_embedder(catalog, config.embedder, embedder_digest)},
    )
    return create_store(location, change, message="create")


def located(config: AtlasConfig) -> AtlasConfig:
    """The same settings with the checkpoint's folder absolute, so that workers elsewhere find it."""
    if config.embedder.checkpoint is None:
        return config
    absolute = str(Path(config.embedder.checkpoint).resolve())
    return dataclasses.replace(config, embedder=dataclasses.replace(config.embedder, checkpoint=absolute))


def reference_key(profile: ReferenceProfile) -> str:
    """Content key of a reference."""
    counts = profile.counts
    parts = [
        profile.totals,
        profile.factors,
        counts.indptr.astype("int64"),
        counts.indices.astype("int32"),
        counts.data,
    ]
    return digest(
        {
            "stage": "reference profile",
            "version": REFERENCE_VERSION,
            "content": [digest(part.tobytes()) for part in parts],
            "symbols": profile.symbols,
            "labels": profile.labels,
            "organism": profile.organism,
        }
    )


def _write_reference(catalog: Catalog, profile: ReferenceProfile) -> str:
    key = reference_key(profile)
    _publish_folder(catalog, "references", key, lambda folder: write_reference(folder, profile))
    return key


def write_embedder(catalog: Catalog, settings: EmbedderConfig, embedder_digest: str) -> str:
    """Publish the description of an embedder; its key."""
    description = {"name": settings.name, "digest": embedder_digest}
    key = digest({"stage": "embedder", **description})

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "embedder.json").write_bytes(canonical_json(description))

    _publish_folder(catalog, "models", key, write)
    return key


def _publish_folder(catalog: Catalog, kind: str, key: str, write: Callable[[Path], None]) -> None:
    final = catalog.path(kind, key)
    if is_complete(final):
        return
    with own_staging(catalog.path("staging", key)) as staging:
        write(staging)
        publish(staging, final, lineage={"kind": kind})

"""Content keys: what every stage's output of a slice is made of, and therefore what it is called.

A key is the digest of the keys of its inputs, of the settings that the stage reads and of the stage's version. An
output is current when its key is the expected one; nothing else decides what runs.

    ingest ──▶ tile ──▶ propagate ──▶ embed ──▶ integrate
      reference (per panel) ────────────▲    model ──▲

The model is the autoencoder, or, for a platform that it was adapted to, the platform's token, whose key follows from
that of the autoencoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from lloki_atlas.config import AtlasConfig, PropagationConfig, digest, to_dict
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.records import SliceRecord

STAGES = ("ingest", "tile", "reference", "propagate", "embed", "integrate")

# raised whenever a stage computes something else from the same inputs and settings
VERSIONS = {"tile": 1, "reference": 2, "propagate": 2, "embed": 2, "train": 2, "adapt": 1, "integrate": 1}

# fields of PropagationConfig that the second graph does not depend on
DIFFUSION_SETTINGS = ("alpha", "keep_observed", "cap_final", "diffuse")

AUTOENCODER = "autoencoder"
# role of the token of a platform; the platform's name follows
TOKEN_ROLE = "token:"

Status = Literal["done", "missing", "stale"]


def atlas_config(catalog: Catalog) -> AtlasConfig:
    """Return the settings of this version of the catalog."""
    return AtlasConfig.from_dict(catalog.state.config)


def platform_name(record: SliceRecord) -> str:
    """Technology and panel: cells that were measured alike."""
    return f"{record.technology}|{record.panel}"


def token_name(record: SliceRecord, token_by: str) -> str:
    """What the condition token of a slice's cells is called: its platform, or the platform and the slice."""
    return platform_name(record) if token_by == "platform" else f"{platform_name(record)}|{record.slice_id}"


def encoder_key(catalog: Catalog, record: SliceRecord) -> str | None:
    """Key of the model that encodes a slice: a token of its own platform, else the autoencoder; None without one."""
    name = token_name(record, atlas_config(catalog).autoencoder.token_by)
    models = catalog.state.models
    return models.get(TOKEN_ROLE + name, models.get(AUTOENCODER))


def expected_objects(catalog: Catalog, record: SliceRecord) -> dict[str, str]:
    """Return the key that every stage of a slice should have at this version, as far as it is decided.

    `integrate` is missing while the catalog has no autoencoder.
    """
    config = atlas_config(catalog)
    keys = {"ingest": record.objects["ingest"]}
    keys["tile"] = _key(
        "tile",
        slice=keys["ingest"],
        reference=catalog.state.reference,
        n_bandwidth_pairs=config.propagation.n_bandwidth_pairs,
        random_state=config.propagation.random_state,
    )
    keys["reference"] = _key(
        "reference",
        reference=catalog.state.reference,
        panel=record.panel,
        embedder=catalog.state.models.get("embedder"),
    )
    keys["propagate"] = _key("propagate", tile=keys["tile"], settings=graph_settings(config.propagation))
    keys["embed"] = _key(
        "embed",
        propagate=keys["propagate"],
        panel=keys["reference"],
        settings={name: getattr(config.propagation, name) for name in DIFFUSION_SETTINGS},
    )
    model = encoder_key(catalog, record)
    if model is not None:
        keys["integrate"] = integrate_key(keys["embed"], model)
    return keys


def graph_settings(settings: PropagationConfig) -> dict[str, object]:
    """Return the settings that decide the second graph."""
    return {name: value for name, value in to_dict(settings).items() if name not in DIFFUSION_SETTINGS}


def integrate_key(embed_key: str, model_key: str) -> str:
    """Key of a slice's 128-d embedding by an autoencoder, or by a token that was adapted to one."""
    return _key("integrate", embed=embed_key, model=model_key)


def model_key(config: AtlasConfig, embed_keys: Mapping[str, str], label_key: str | None) -> str:
    """Key of an autoencoder trained on these slices' embeddings."""
    return _key("train", settings=to_dict(config.autoencoder), embeddings=dict(embed_keys), label_key=label_key)


def token_key(model: str, platform: str, embed_keys: Mapping[str, str], atlas: Iterable[str], random_state: int) -> str:
    """Key of a token that was adapted to an autoencoder.

    Parameters
    ----------
    model
        Key of the autoencoder.
    platform
        Name of the token.
    embed_keys
        Slices of the platform that it is adapted on, and the keys of their 512-d embeddings.
    atlas
        Slices of the autoencoder that they are compared with; which embeddings those are follows from `model`.
    random_state
        Seed.
    """
    return _key(
        "adapt",
        model=model,
        platform=platform,
        embeddings=dict(embed_keys),
        atlas=sorted(atlas),
        random_state=random_state,
    )


def stage_status(catalog: Catalog, record: SliceRecord) -> dict[str, Status]:
    """Say for every stage of a slice whether its output is done, missing, or stale (made of something else)."""
    expected = expected_objects(catalog, record)
    status: dict[str, Status] = {}
    for stage in STAGES:
        held = record.objects.get(stage)
        if held is None:
            status[stage] = "missing"
        else:
            status[stage] = "done" if held == expected.get(stage) else "stale"
    return status


def _key(stage: str, **parts: object) -> str:
    return digest({"stage": stage, "version": VERSIONS[stage], **parts})

"""Content keys: what every stage's output of a slice is made of, and therefore what it is called.

A key is the digest of the keys of its inputs, of the settings that the stage reads and of the stage's version. An
output is current when its key is the expected one; nothing else decides what runs.

    ingest ──▶ tile ──▶ propagate ──▶ embed ──▶ integrate
      reference (per panel) ────────────▲    model ──▲

The model is the autoencoder, or, for a platform that it was adapted to, the platform's token, whose key follows from
that of the autoencoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

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

# name in a receipt's lineage of what the object's key is the digest of
MADE_OF = "made_of"

Status = Literal["done", "missing", "stale"]
Recipe = dict[str, Any]


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
    return _encoder_key(catalog.state.models, record, atlas_config(catalog).autoencoder.token_by)


def expected_objects(catalog: Catalog, record: SliceRecord) -> dict[str, str]:
    """Return the key that every stage of a slice should have at this version, as far as it is decided.

    `integrate` is missing while the catalog has no autoencoder.
    """
    return expectation(catalog)(record).keys


class Expected(NamedTuple):
    """Key of every stage's output of a slice, and for the stages after ingest what it is made of, by stage."""

    keys: dict[str, str]
    recipes: dict[str, Recipe]


def expectation(catalog: Catalog) -> Callable[[SliceRecord], Expected]:
    """Return a function of a slice: what the outputs of its stages should be at this version.

    The settings are read once for all slices. The key of an output is the digest of its recipe, which its receipt holds
    as well: that says later why it is stale.
    """
    config, state = atlas_config(catalog), catalog.state
    of_graph = graph_settings(config.propagation)
    of_diffusion = {name: getattr(config.propagation, name) for name in DIFFUSION_SETTINGS}
    of_statistics = {name: getattr(config.propagation, name) for name in ("n_bandwidth_pairs", "random_state")}
    embedder, token_by = state.models.get("embedder"), config.autoencoder.token_by
    panels: dict[str, tuple[str, Recipe]] = {}  # many slices share one

    def expected(record: SliceRecord) -> Expected:
        keys = {"ingest": record.objects["ingest"]}
        recipes: dict[str, Recipe] = {}

        def add(stage: str, **parts: object) -> None:
            recipes[stage] = _recipe(stage, **parts)
            keys[stage] = digest(recipes[stage])

        add("tile", slice=keys["ingest"], reference=state.reference, **of_statistics)
        if record.panel not in panels:
            add("reference", reference=state.reference, panel=record.panel, embedder=embedder)
            panels[record.panel] = keys["reference"], recipes["reference"]
        keys["reference"], recipes["reference"] = panels[record.panel]
        add("propagate", tile=keys["tile"], settings=of_graph)
        add("embed", propagate=keys["propagate"], panel=keys["reference"], settings=of_diffusion)
        model = _encoder_key(state.models, record, token_by)
        if model is not None:
            add("integrate", embed=keys["embed"], model=model)
        return Expected(keys, recipes)

    return expected


def graph_settings(settings: PropagationConfig) -> dict[str, object]:
    """Return the settings that decide the second graph."""
    return {name: value for name, value in to_dict(settings).items() if name not in DIFFUSION_SETTINGS}


def integrate_key(embed_key: str, model_key: str) -> str:
    """Key of a slice's 128-d embedding by an autoencoder, or by a token that was adapted to one."""
    return digest(integrate_recipe(embed_key, model_key))


def integrate_recipe(embed_key: str, model_key: str) -> Recipe:
    """What a slice's 128-d embedding is made of."""
    return _recipe("integrate", embed=embed_key, model=model_key)


def model_key(config: AtlasConfig, embed_keys: Mapping[str, str], label_key: str | None) -> str:
    """Key of an autoencoder trained on these slices' embeddings."""
    return digest(model_recipe(config, embed_keys, label_key))


def model_recipe(config: AtlasConfig, embed_keys: Mapping[str, str], label_key: str | None) -> Recipe:
    """What an autoencoder is made of: settings, the slices' embeddings, the column of cell types."""
    return _recipe("train", settings=to_dict(config.autoencoder), embeddings=dict(embed_keys), label_key=label_key)


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
    return digest(
        _recipe(
            "adapt",
            model=model,
            platform=platform,
            embeddings=dict(embed_keys),
            atlas=sorted(atlas),
            random_state=random_state,
        )
    )


def stage_status(catalog: Catalog, record: SliceRecord) -> dict[str, Status]:
    """Say for every stage of a slice whether its output is done, missing, or stale (made of something else)."""
    return compare_keys(record, expected_objects(catalog, record))


def compare_keys(record: SliceRecord, expected: Mapping[str, str]) -> dict[str, Status]:
    """As `stage_status`, of keys that are known."""
    status: dict[str, Status] = {}
    for stage in STAGES:
        held = record.objects.get(stage)
        if held is None:
            status[stage] = "missing"
        else:
            status[stage] = "done" if held == expected.get(stage) else "stale"
    return status


def _encoder_key(models: Mapping[str, str], record: SliceRecord, token_by: str) -> str | None:
    return models.get(TOKEN_ROLE + token_name(record, token_by), models.get(AUTOENCODER))


def _recipe(stage: str, **parts: object) -> Recipe:
    return {"stage": stage, "version": VERSIONS[stage], **parts}

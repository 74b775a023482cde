"""Other settings for a catalog that is there: one version, and only what depends on them runs again."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lloki_atlas.config import AtlasConfig, settings_from_dict, to_dict
from lloki_atlas.errors import InputError
from lloki_atlas.models.embedders import embedder_factory
from lloki_atlas.stages.create import located, write_embedder
from lloki_atlas.stages.lineage import atlas_config
from lloki_atlas.store.catalog import Catalog, commit
from lloki_atlas.store.records import Change

# settings that slices or the reference were made with, and what would have to be made anew
FIXED = {
    "tile.tile_cells": "its slices are cut into tiles of that size",
    "embedder.n_factors": "its reference was fitted with it",
}
# the field of a section that decides others
_DECIDING = {"propagation": "mode", "autoencoder": "preset"}


def configure(catalog: Catalog, settings: Mapping[str, Any]) -> Catalog:
    """Change settings of a catalog.

    Parameters
    ----------
    catalog
        Opened with mode "r+".
    settings
        Values by name, such as `{"propagation.alpha": 0.5}`. With `propagation.mode` or `autoencoder.preset` the fields
        that the former one decided are decided anew, unless they are given too.

    Returns
    -------
    Catalog
        At a new version with these settings; the same catalog where they are its settings already. What they make
        stale is said by `status` and `plan`, and made again by `run`.

    Raises
    ------
    InputError
        If there is no such setting, a value is out of range, or the catalog cannot change it any more.
    CheckpointError
        If the checkpoint of another embedder does not fit its description.
    """
    if catalog.mode == "r":
        raise InputError(f"{catalog.root} is open for reading: open it with mode='r+' to change settings")
    before = atlas_config(catalog)
    after = located(_changed(before, _by_section(settings)))
    differing = _differences(before, after)
    for name in differing:
        if name in FIXED:
            raise InputError(
                f"{name} of {catalog.root} cannot change, {FIXED[name]}: create another catalog with that setting"
            )
    if not differing:
        return catalog
    models = {}
    if after.embedder != before.embedder:
        digest = embedder_factory(after.embedder.name).digest(after.embedder)
        key = write_embedder(catalog, after.embedder, digest)
        if catalog.state.models.get("embedder") != key:
            models["embedder"] = key
    message = "configure: " + ", ".join(f"{name} {old} → {new}" for name, (old, new) in differing.items())
    return commit(catalog, Change(config=to_dict(after), models=models), message=message)


def parse_settings(texts: list[str]) -> dict[str, Any]:
    """Read `section.name=value`, the value as in TOML; text needs no quotes.

    Raises
    ------
    InputError
        If there is no `=`, or a setting is given twice.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not value:
            raise InputError(f"'{text}' is no setting: write section.name=value, such as propagation.alpha=0.5")
        if name in settings:
            raise InputError(f"{name} is given twice: give it once")
        try:
            settings[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            settings[name] = value
    return settings


def _by_section(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {}
    known = to_dict(AtlasConfig())
    for name, value in settings.items():
        section, dot, field = name.partition(".")
        if not dot or section not in known:
            raise InputError(f"'{name}' is no setting: write section.name with a section of {', '.join(known)}")
        sections.setdefault(section, {})[field] = value
    return sections


def _changed(config: AtlasConfig, sections: Mapping[str, Mapping[str, Any]]) -> AtlasConfig:
    parts = {}
    for section, given in sections.items():
        held = getattr(config, section)
        values = to_dict(held)
        deciding = _DECIDING.get(section)
        if deciding is not None and deciding in given:
            decided = to_dict(type(held)(**{deciding: values[deciding]}))
            values = {name: value for name, value in values.items() if value != decided[name]}
        parts[section] = settings_from_dict(type(held), {**values, **given}, where=f"settings.{section}")
    return replace(config, **parts)


def _differences(before: AtlasConfig, after: AtlasConfig) -> dict[str, tuple[Any, Any]]:
    old, new = to_dict(before), to_dict(after)
    return {
        f"{section}.{name}": (old[section][name], value)
        for section, values in new.items()
        for name, value in values.items()
        if old[section][name] != value
    }

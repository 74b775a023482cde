"""The public verb that takes a new technology into a finished atlas: its token is trained, nothing old changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lloki_atlas.errors import InputError, NotFoundError
from lloki_atlas.stages.adapt_tasks import token_description
from lloki_atlas.stages.lineage import AUTOENCODER, TOKEN_ROLE, atlas_config, token_name
from lloki_atlas.stages.pipeline import run
from lloki_atlas.stages.train import checkpoint_description
from lloki_atlas.store.catalog import Catalog
from lloki_atlas.store.records import nearest_names


def adapt_autoencoder(
    catalog: Catalog,
    *,
    technology: str,
    slices: Iterable[str] | None = None,
    random_state: int | None = None,
    client: Any = None,
    progress: bool = True,
    n_workers: int | None = None,
    n_gpus: int | None = None,
    device_memory_mb: int | None = None,
) -> Catalog:
    """Adapt the autoencoder to the panels of a technology that it does not know, and encode their slices.

    A token is trained for each panel, 20 numbers, while the autoencoder is frozen: no object of the atlas changes, and
    neither does any embedding of another slice.

    Parameters
    ----------
    catalog
        Opened with mode "r+", with a trained autoencoder.
    technology
        The new technology, as its slices were ingested.
    slices
        Slices to adapt on; all of the technology whose panel the autoencoder does not know when None. All slices of
        their panels are encoded.
    random_state
        Seed; when None, that of the token a panel has already, else the atlas's own.
    client, progress, n_workers, n_gpus
        As for `Plan.run`.
    device_memory_mb
        As for `plan`.

    Returns
    -------
    The catalog at the version that holds the tokens and the new 128-d embeddings; the same version where there was
    nothing to do.

    Raises
    ------
    InputError
        If there is no current autoencoder, it knows the technology's panels, or, while it runs, a panel has too few
        cells or shares no structure with the atlas.
    NotFoundError
        If there is no slice of the technology, or a slice does not exist.
    """
    chosen = _new_slices(catalog, technology, slices)
    token_by = atlas_config(catalog).autoencoder.token_by
    names = {token_name(catalog.slice(slice_id), token_by) for slice_id in chosen}
    encoded = [slice_id for slice_id, record in catalog.state.slices.items() if token_name(record, token_by) in names]
    return run(
        catalog,
        client=client,
        progress=progress,
        n_workers=n_workers,
        n_gpus=n_gpus,
        slices=encoded,
        adapt_on=chosen,
        adapt_seed=random_state,
        device_memory_mb=device_memory_mb,
    )


def adaptation_report(catalog: Catalog, technology: str) -> list[dict[str, Any]]:
    """Say what was measured of the tokens of a technology, one entry each.

    Returns
    -------
    list of dict
        `platform`, `token` and `autoencoder` (keys), `path`, the `slices` that are encoded with the token, and the
        evidence: `n_cells` it was adapted on, `n_atlas_cells` they were compared with, `structure` and
        `structure_of_atlas`, `paired`, `similarity`, `moved`, `mixing_before`, `mixing`; see
        `lloki_atlas.models.adaptation`.
    """
    token_by = atlas_config(catalog).autoencoder.token_by
    slices: dict[str, list[str]] = {}
    for slice_id, record in sorted(catalog.state.slices.items()):
        if record.technology == technology:
            slices.setdefault(token_name(record, token_by), []).append(slice_id)
    report = []
    for name, encoded in sorted(slices.items()):
        key = catalog.state.models.get(TOKEN_ROLE + name)
        if key is None:
            continue
        description = token_description(catalog, key)
        report.append(
            {
                "platform": name,
                "token": key,
                "autoencoder": description["model"],
                "path": str(catalog.path("models", key)),
                "slices": encoded,
                **description["evidence"],
            }
        )
    return report


def _new_slices(catalog: Catalog, technology: str, slices: Iterable[str] | None) -> list[str]:
    """Slices to adapt on: of the technology, and of panels that the autoencoder does not know."""
    technologies = {record.technology for record in catalog.state.slices.values()}
    if technology not in technologies:
        near = nearest_names(technology, technologies)
        raise NotFoundError(f"no slice of {catalog.root} is of the technology '{technology}': {near}")
    key = catalog.state.models.get(AUTOENCODER)
    if key is None:
        raise InputError(
            f"{catalog.root} has no autoencoder to adapt to yet: run the atlas first with `lloki-atlas run`"
        )
    known = set(checkpoint_description(catalog, key)["platforms"])
    token_by = atlas_config(catalog).autoencoder.token_by
    names = sorted(catalog.state.slices) if slices is None else sorted(set(slices))
    chosen = []
    for slice_id in names:
        record = catalog.slice(slice_id)
        is_known = token_name(record, token_by) in known
        if record.technology == technology and not is_known:
            chosen.append(slice_id)
        elif slices is not None:
            why = (
                "the autoencoder already has a token for it, `lloki-atlas train` makes a new model"
                if record.technology == technology
                else f"it is of the technology '{record.technology}'"
            )
            raise InputError(f"slice '{slice_id}' is none to adapt to '{technology}' on: {why}")
    if not chosen:
        raise InputError(
            f"the autoencoder already has a token for every panel of '{technology}': there is nothing to adapt, "
            "`lloki-atlas train` makes a new model"
        )
    return chosen

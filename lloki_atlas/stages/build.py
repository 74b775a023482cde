"""`build`: from a manifest to a committed atlas, start to end, resumable at any point."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lloki_atlas.config import to_dict
from lloki_atlas.errors import InputError, NotFoundError
from lloki_atlas.stages.create import create_catalog, located, reference_key
from lloki_atlas.stages.ingest import ingest
from lloki_atlas.stages.manifest import Manifest, SliceSource, read_manifest
from lloki_atlas.stages.pipeline import run
from lloki_atlas.stages.reference import fit_reference
from lloki_atlas.stages.sources import section_values
from lloki_atlas.store.catalog import Catalog, open_catalog
from lloki_atlas.store.places import Place, place


def build(
    manifest: str | Path | Manifest,
    *,
    root: str | Path | None = None,
    until: str = "integrate",
    client: Any = None,
    progress: bool = True,
    n_workers: int | None = None,
    n_gpus: int | None = None,
    device_memory_mb: int | None = None,
) -> Catalog:
    """Build the atlas that a manifest describes, or what is missing of it.

    Parameters
    ----------
    manifest
        A `catalogs/*.toml`.
    root
        Folder of the catalog; `<name>.atlas` in the working directory when None.
    until
        Last stage to run.
    client, n_workers, n_gpus
        A `distributed.Client`, or the size of a local cluster; GPU workers as for `Plan.run`.
    progress
        Show progress on standard error.
    device_memory_mb
        Most that this run takes of a GPU, in 2^20 bytes; what the settings of the embedder say when None.

    Returns
    -------
    The catalog at the version that holds everything.

    Raises
    ------
    InputError
        If the manifest, the reference or a slice cannot be used; the catalog keeps what was committed before.
    """
    described = manifest if isinstance(manifest, Manifest) else read_manifest(manifest)
    location = place(root if root is not None else f"{described.name}.atlas")
    if described.simulation is not None:
        described = _simulated(described, location)
    slices = [part for entry in described.slices for part in _sections(described, entry)]
    ids = [str(entry.slice_id) for entry in slices]
    for name in ids:
        if ids.count(name) > 1:
            raise InputError(f"{described.path} names the slice '{name}' twice: give each slice its own slice_id")
    catalog = _open_or_create(described, location)
    for entry in slices:
        catalog = _ingest(catalog, described, entry)
    return run(
        catalog,
        client=client,
        progress=progress,
        n_workers=n_workers,
        n_gpus=n_gpus,
        until=until,
        device_memory_mb=device_memory_mb,
    )


def _simulated(manifest: Manifest, location: Place) -> Manifest:
    """Make the sources beside the catalog; equal settings make equal files, which ingest then recognises."""
    from lloki_atlas.simulation import simulate

    beside = location.parent if isinstance(location, Path) else Path()
    sources = simulate(beside / f"{location.name}.sources", **asdict(manifest.simulation))  # type: ignore[arg-type]
    return replace(read_manifest(sources), name=manifest.name, path=manifest.path, config=manifest.config)


def _open_or_create(manifest: Manifest, location: Place) -> Catalog:
    try:
        catalog = open_catalog(location, mode="r+")
    except NotFoundError:
        catalog = None
    reference = manifest.reference
    if reference is None:
        raise InputError(f"{manifest.path} has no [reference]")
    source = _source(manifest, reference.source, None)
    if catalog is None:
        return create_catalog(
            location,
            reference=source,
            organism=reference.organism,
            label_key=reference.label_key,
            layer=reference.layer,
            config=manifest.config,
        )
    differs = f"than {manifest.path} asks for: build into another folder with --root"
    if catalog.state.config != to_dict(located(manifest.config)):
        raise InputError(f"{location} was built with other settings {differs}")
    profile = fit_reference(
        source,
        organism=reference.organism,
        label_key=reference.label_key,
        layer=reference.layer,
        n_factors=manifest.config.embedder.n_factors,
    )
    if reference_key(profile) != catalog.state.reference:
        raise InputError(f"{location} was built with another reference {differs}")
    return catalog


def _sections(manifest: Manifest, entry: SliceSource) -> list[SliceSource]:
    """One entry per slice: a file with a `slice_key` and no value holds several."""
    path = _source(manifest, entry.source, entry.url)
    if entry.slice_key is None or entry.slice_value is not None:
        return [replace(entry, slice_id=entry.slice_id or entry.slice_value or path.stem)]
    return [
        replace(entry, slice_value=value, slice_id=f"{entry.slice_id}_{value}" if entry.slice_id else value)
        for value in section_values(path, entry.slice_key)
    ]


def _ingest(catalog: Catalog, manifest: Manifest, entry: SliceSource) -> Catalog:
    gene_map = None if entry.gene_map is None else _source(manifest, entry.gene_map, None)
    return ingest(
        catalog,
        _source(manifest, entry.source, entry.url),
        slice_id=str(entry.slice_id),
        technology=entry.technology,
        organism=entry.organism,
        coordinate_unit=entry.coordinate_unit,
        um_per_unit=entry.um_per_unit,
        spatial_key=entry.spatial_key,
        label_key=entry.label_key,
        layer=entry.layer,
        slice_key=entry.slice_key,
        slice_value=entry.slice_value,
        table=entry.table,
        empty_cells=entry.empty_cells,
        accept_normalized=entry.accept_normalized,
        gene_map=gene_map,
    )


def _source(manifest: Manifest, name: str, url: str | None) -> Path:
    path = manifest.data / name
    if not path.exists():
        advice = f"get it from {url}" if url else "check the data folder of the manifest"
        raise InputError(f"{manifest.path} names {path}, which does not exist: {advice}")
    return path

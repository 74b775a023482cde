"""From a manifest to an atlas: once, twice, with more slices, in sections, simulated, and refused."""

from __future__ import annotations

import shutil
from functools import cache

import anndata
import numpy as np
import pytest
from support.atlases import CONFIG, SLICES, all_bytes, settings_text, slice_text, write_manifest
from support.folders import folder_digest

from lloki_atlas.config import to_dict
from lloki_atlas.errors import InputError
from lloki_atlas.stages import build as module
from lloki_atlas.stages.build import build
from lloki_atlas.stages.lineage import STAGES, stage_status
from lloki_atlas.stages.manifest import read_manifest
from lloki_atlas.store.catalog import history, open_catalog
from lloki_atlas.store.slices import SliceStore


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sources, client):
    """An atlas that was built of a manifest; copy it where a test changes it."""
    folder = tmp_path_factory.mktemp("built")
    build(write_manifest(folder / "atlas.toml", sources), root=folder / "atlas", client=client, progress=False)
    return folder


@pytest.fixture
def mine(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def without_run(monkeypatch):
    """Build up to the run: what is tested is what goes in."""
    monkeypatch.setattr(module, "run", lambda catalog, **_: catalog)


def test_a_built_atlas_is_done(whole):
    catalog = open_catalog(whole / "atlas")
    assert {name: stage_status(catalog, record) for name, record in catalog.state.slices.items()} == dict.fromkeys(
        SLICES, dict.fromkeys(STAGES, "done")
    )


def test_a_built_atlas_is_the_one_that_is_made_step_by_step(whole, built):
    assert all_bytes(open_catalog(whole / "atlas")) == all_bytes(open_catalog(built))


def test_a_slice_is_called_like_its_file_where_no_id_is_given(whole):
    assert sorted(open_catalog(whole / "atlas").state.slices) == sorted(SLICES)


def test_building_again_makes_nothing_new(mine):
    before = folder_digest(mine / "atlas")
    catalog = build(mine / "atlas.toml", root=mine / "atlas", progress=False, n_workers=-1)
    assert catalog.version == 4
    assert folder_digest(mine / "atlas") == before


def test_a_manifest_that_was_read_before_is_taken(mine):
    manifest = read_manifest(mine / "atlas.toml")
    assert build(manifest, root=mine / "atlas", progress=False, n_workers=-1).version == 4


@pytest.mark.parametrize("changed", [{"propagation": {"alpha": 0.5}}, {"tile": {"tile_cells": 9}}])
def test_other_settings_are_not_built_into_the_same_folder(mine, sources, changed):
    before = folder_digest(mine / "atlas")
    other = write_manifest(mine / "other.toml", sources, settings=settings_text(**changed))
    with pytest.raises(
        InputError, match=r"was built with other settings than .*other\.toml asks for: build into another folder"
    ):
        build(other, root=mine / "atlas", progress=False)
    assert folder_digest(mine / "atlas") == before


def test_a_slice_that_is_added_to_the_manifest_is_added_to_the_atlas(mine, sources, client):
    before = all_bytes(open_catalog(mine / "atlas"))
    names = (*SLICES, "simfish_2")
    write_manifest(mine / "atlas.toml", sources, *(slice_text(f"{name}.h5ad") for name in names))
    catalog = build(mine / "atlas.toml", root=mine / "atlas", client=client, progress=False)
    after = all_bytes(catalog)
    assert sorted(catalog.state.slices) == sorted(names)
    assert {key: after[key] for key in before} == before


@pytest.mark.usefixtures("without_run")
def test_a_source_that_changed_under_the_same_id_is_refused(mine, sources):
    write_manifest(
        mine / "atlas.toml", sources, slice_text("simfish_2.h5ad", slice_id="simfish_1"), slice_text("simmap_1.h5ad")
    )
    with pytest.raises(InputError, match=r"slice 'simfish_1' is in .* already with other content"):
        build(mine / "atlas.toml", root=mine / "atlas")


@pytest.mark.usefixtures("without_run")
def test_what_was_ingested_before_a_refusal_stays_and_a_mended_manifest_continues(tmp_path, sources):
    good, bad = slice_text("simfish_1.h5ad"), slice_text("simmap_1.h5ad", label_key="class")
    manifest = write_manifest(tmp_path / "atlas.toml", sources, good, bad)
    with pytest.raises(InputError, match="no obs column 'class'"):
        build(manifest, root=tmp_path / "atlas")
    assert list(open_catalog(tmp_path / "atlas").state.slices) == ["simfish_1"]
    write_manifest(manifest, sources, good, slice_text("simmap_1.h5ad"))
    messages = [record.message for record in history(build(manifest, root=tmp_path / "atlas"))]
    assert messages == ["create", "ingest simfish_1", "ingest simmap_1"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"slices": [slice_text("none.h5ad", url="https://example.org/none")]},
            r"names .*none\.h5ad, which does not exist: get it from https://example.org/none",
        ),
        ({"slices": [slice_text("none.h5ad")]}, r"none\.h5ad, which does not exist: check the data folder"),
        (
            {"slices": [slice_text("none.h5ad", slice_key="section", url="the archive")]},
            "does not exist: get it from the archive",
        ),
        ({"reference": "gone.h5ad"}, r"gone\.h5ad, which does not exist: check the data folder of the manifest"),
        (
            {"slices": [slice_text("simfish_1.h5ad"), slice_text("simfish_1.h5ad")]},
            "names the slice 'simfish_1' twice: give each slice its own slice_id",
        ),
        (
            {"slices": [slice_text("simfish_1.h5ad", slice_key="section")]},
            "no obs column 'section': choose slice_key from",
        ),
    ],
    ids=["with url", "without url", "sections of nothing", "reference", "twice", "no such column"],
)
def test_what_is_wrong_with_sources_is_said_before_a_catalog_is_made(tmp_path, sources, parts, message):
    manifest = write_manifest(tmp_path / "atlas.toml", sources, *parts.pop("slices", ()), **parts)
    with pytest.raises(InputError, match=message):
        build(manifest, root=tmp_path / "atlas")
    assert not (tmp_path / "atlas").exists()


@pytest.mark.usefixtures("without_run")
def test_a_gene_map_that_is_missing_is_refused_by_name(tmp_path, sources):
    manifest = write_manifest(tmp_path / "atlas.toml", sources, slice_text("simfish_1.h5ad", gene_map="map.tsv"))
    with pytest.raises(InputError, match=r"names .*map\.tsv, which does not exist"):
        build(manifest, root=tmp_path / "atlas")


def test_a_folder_that_holds_something_else_is_refused(tmp_path, sources):
    (tmp_path / "atlas").mkdir()
    (tmp_path / "atlas" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already and is not empty"):
        build(write_manifest(tmp_path / "atlas.toml", sources), root=tmp_path / "atlas")


@pytest.mark.usefixtures("without_run")
def test_the_folder_of_an_atlas_is_its_name_in_the_working_directory(tmp_path, sources, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manifest = write_manifest(tmp_path / "atlas.toml", sources, slice_text("simfish_1.h5ad"))
    assert build(manifest).root == tmp_path / "small.atlas"


@cache
def sectioned(folder, sources):
    """A file with three sections; some cells belong to none."""
    table = anndata.read_h5ad(sources / "simfish_1.h5ad")
    names = np.array(["left", "right", "far right", None], dtype=object)
    table.obs["section"] = names[np.arange(table.n_obs) % 4]
    folder.mkdir(exist_ok=True)
    table.write_h5ad(folder / "sections.h5ad")
    shutil.copy(sources / "reference.h5ad", folder / "reference.h5ad")
    return folder


@pytest.fixture
def sections(tmp_path_factory, sources):
    return sectioned(tmp_path_factory.getbasetemp() / "sections", sources)


@pytest.mark.usefixtures("without_run")
@pytest.mark.parametrize(
    ("options", "slices"),
    [
        ({}, {"left": "left", "right": "right", "far right": "far right"}),
        ({"slice_id": "s1"}, {"s1_left": "left", "s1_right": "right", "s1_far right": "far right"}),
        ({"slice_value": "left"}, {"left": "left"}),
        ({"slice_value": "left", "slice_id": "one"}, {"one": "left"}),
    ],
    ids=["all", "all with a prefix", "one", "one with a name"],
)
def test_every_section_of_a_file_is_a_slice(tmp_path, sections, monkeypatch, options, slices):
    taken = {}

    def take(catalog, source, *, slice_id, slice_key, slice_value, **_):
        taken[slice_id] = slice_value
        assert (source.name, slice_key) == ("sections.h5ad", "section")
        return catalog

    monkeypatch.setattr(module, "ingest", take)
    entry = slice_text("sections.h5ad", slice_key="section", **options)
    build(write_manifest(tmp_path / "atlas.toml", sections, entry), root=tmp_path / "atlas")
    assert taken == slices


@pytest.mark.usefixtures("without_run")
def test_a_section_holds_its_own_cells(tmp_path, sections):
    entry = slice_text("sections.h5ad", slice_key="section", slice_value="right")
    catalog = build(write_manifest(tmp_path / "atlas.toml", sections, entry), root=tmp_path / "atlas")
    store = SliceStore(catalog.path("slices", catalog.slice("right").objects["ingest"]))
    assert sorted(store.obs(["source_row"])["source_row"]) == list(range(1, 60, 4))


SIMULATED = '[atlas]\nname = "made"\n[simulate]\nn_cells = 40\nn_slices = 2\nrandom_state = 3\n'


@pytest.fixture(scope="module")
def simulated(tmp_path_factory, client):
    folder = tmp_path_factory.mktemp("simulated")
    (folder / "made.toml").write_text(SIMULATED + settings_text())
    build(folder / "made.toml", root=folder / "atlas", client=client, progress=False)
    return folder


def test_a_simulated_atlas_is_built_to_the_end(simulated):
    catalog = open_catalog(simulated / "atlas")
    assert {record.n_cells for record in catalog.state.slices.values()} == {20}
    assert all(set(stage_status(catalog, part).values()) == {"done"} for part in catalog.state.slices.values())


def test_sources_of_a_simulated_atlas_lie_beside_it(simulated):
    assert sorted(path.name for path in (simulated / "atlas.sources").glob("*.h5ad")) == [
        "reference.h5ad",
        "simfish_1.h5ad",
        "simmap_1.h5ad",
    ]


def test_a_simulated_atlas_has_the_settings_of_its_manifest(simulated):
    assert open_catalog(simulated / "atlas").state.config == to_dict(CONFIG)


def test_building_a_simulated_atlas_again_makes_nothing_new(simulated):
    before = folder_digest(simulated / "atlas")
    build(simulated / "made.toml", root=simulated / "atlas", progress=False, n_workers=-1)
    assert folder_digest(simulated / "atlas") == before


def test_a_manifest_that_names_another_reference_is_refused(sources, tmp_path):
    folder = tmp_path / "sources"
    shutil.copytree(sources, folder)
    build(folder / "atlas.toml", root=tmp_path / "atlas", until="ingest", progress=False)
    adata = anndata.read_h5ad(folder / "reference.h5ad")
    adata[: adata.n_obs - 1].copy().write_h5ad(folder / "reference.h5ad")
    with pytest.raises(InputError, match=r"another reference than .* asks for: build into another folder"):
        build(folder / "atlas.toml", root=tmp_path / "atlas", until="ingest", progress=False)

"""Two published slices of mouse cortex, of 33 and 166 genes, built from a manifest to the end."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.atlases import embedding, settings_text

from lloki_atlas.config import AtlasConfig, AutoencoderConfig
from lloki_atlas.stages.build import build
from lloki_atlas.stages.train import NO_LABEL, checkpoint_description
from lloki_atlas.store.arrays import read_arrays
from lloki_atlas.store.catalog import verify
from lloki_atlas.store.slices import SliceStore

LABEL = "cell_type_coarse"
CONFIG = AtlasConfig(autoencoder=AutoencoderConfig(n_epochs=1, chunk_cells=1000, max_cells_per_technology=1000))
MANIFEST = """
[atlas]
name = "two"
data = {folder}
[reference]
source = "ref_mop_10x_biccn.h5ad"
organism = "mouse"
label_key = "cell_type_coarse"
[[slices]]
source = "osmfish_ssp_codeluppi2018.h5ad"
slice_id = "osmfish"
technology = "osmFISH"
organism = "mouse"
coordinate_unit = "micrometer"
label_key = "cell_type_coarse"
[[slices]]
source = "starmap_mpfc_wang2018.h5ad"
slice_key = "slice"
slice_value = "starmap_BZ5"
technology = "STARmap"
organism = "mouse"
coordinate_unit = "pixel"
um_per_unit = 0.085
label_key = "cell_type_coarse"
"""


@pytest.fixture(scope="module")
def atlas(tmp_path_factory, data_folder, client):
    folder = tmp_path_factory.mktemp("published")
    manifest = folder / "two.toml"
    manifest.write_text(MANIFEST.format(folder=json.dumps(str(data_folder))) + settings_text(CONFIG))
    return build(manifest, root=folder / "atlas", client=client, progress=False)


def labels_of(catalog, slice_id):
    store = SliceStore(catalog.path("slices", catalog.slice(slice_id).objects["ingest"]))
    return store.obs([LABEL])[LABEL].astype(str).to_numpy()


@pytest.mark.parametrize("name", ["X_fp", "X_lloki"])
@pytest.mark.parametrize("slice_id", ["osmfish", "starmap_BZ5"])
def test_every_labelled_cell_with_a_count_in_a_shared_gene_has_finite_vectors(atlas, slice_id, name):
    statistics = atlas.path("statistics", atlas.slice(slice_id).objects["tile"])
    filled = read_arrays(statistics, ["nonzeros"])["nonzeros"] > 0
    labelled = ~np.isin(labels_of(atlas, slice_id), NO_LABEL)
    finite = np.isfinite(embedding(atlas, slice_id, name))
    assert (labelled & filled).sum() > 1000
    assert finite[labelled & filled].all()
    assert not finite[~filled].any()


@pytest.mark.parametrize("slice_id", ["osmfish", "starmap_BZ5"])
def test_the_nearest_vector_of_a_cell_has_its_label_more_often_than_chance(atlas, slice_id):
    labels, vectors = labels_of(atlas, slice_id), embedding(atlas, slice_id).astype(np.float32)
    rows = np.flatnonzero(np.isfinite(vectors[:, 0]) & ~np.isin(labels, NO_LABEL))[:1000]
    labels, vectors = labels[rows], vectors[rows]
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    hits = labels[similarity.argmax(axis=1)] == labels
    chance = sum((labels == label).mean() ** 2 for label in np.unique(labels))
    assert hits.mean() > chance + 0.1


def test_losses_of_the_training_are_finite(atlas):
    (losses,) = checkpoint_description(atlas, atlas.state.models["autoencoder"])["history"]
    assert all(np.isfinite(value) for value in losses.values())


def test_every_object_is_whole(atlas):
    assert verify(atlas) == []

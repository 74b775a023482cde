from __future__ import annotations

import tomllib
import tracemalloc
from itertools import combinations
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy.spatial import ConvexHull, cKDTree

from lloki_atlas.errors import InputError
from lloki_atlas.simulation import simulate
from lloki_atlas.simulation.genes import PROGRAMMES, REFERENCE_GENES
from lloki_atlas.simulation.platforms import CORE_GENES, DISSOCIATED, PLATFORMS
from lloki_atlas.simulation.tissue import CELL_TYPES, COARSE_TYPES, LAYERS

N_CELLS = 6000
IDS = ("simfish_1", "simmap_1", "simfish_plus_1", "simish_1")
MODERN = {"Ctgf": "Ccn2", "Nov": "Ccn3"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("simulated"), n_cells=N_CELLS, n_slices=4).parent


@pytest.fixture(scope="module")
def slices(folder: Path) -> dict[str, ad.AnnData]:
    return {slice_id: ad.read_h5ad(folder / f"{slice_id}.h5ad") for slice_id in IDS}


@pytest.fixture(scope="module")
def reference(folder: Path) -> ad.AnnData:
    return ad.read_h5ad(folder / "reference.h5ad")


def gene_counts(adata: ad.AnnData) -> np.ndarray:
    return adata.X[:, ~adata.var_names.str.startswith("Blank-")].toarray()


def same_contents(first: ad.AnnData, second: ad.AnnData) -> bool:
    return (
        first.shape == second.shape
        and (first.X != second.X).nnz == 0
        and first.obs.equals(second.obs)
        and first.var_names.equals(second.var_names)
        and all(np.array_equal(first.obsm[key], second.obsm[key]) for key in first.obsm)
        and dict(first.uns["source"]) == dict(second.uns["source"])
    )


def standardised(adata: ad.AnnData, genes: list[str]) -> np.ndarray:
    names = [MODERN.get(name, name) for name in adata.var_names]
    counts = adata.X[:, [names.index(gene) for gene in genes]].toarray()
    logged = np.log1p(100.0 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0))
    scaled = (logged - logged.mean(axis=0)) / (logged.std(axis=0) + 1e-3)
    return scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-9)


def balanced_accuracy(reference: ad.AnnData, query: ad.AnnData, label_key: str) -> float:
    genes = sorted({MODERN.get(name, name) for name in query.var_names} & set(reference.var_names))
    rows, queries = standardised(reference, genes), standardised(query, genes)
    types = list(reference.obs[label_key].cat.categories)
    centroids = np.stack([rows[reference.obs[label_key] == name].mean(axis=0) for name in types])
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    called = np.array(types)[(queries @ centroids.T).argmax(axis=1)]
    truth = query.obs[label_key].astype(str).to_numpy()
    return float(np.mean([(called[truth == name] == name).mean() for name in np.unique(truth)]))


# files and manifest


def test_manifest_names_every_file_in_the_folder(folder: Path) -> None:
    manifest = tomllib.loads((folder / "atlas.toml").read_text())

    named = {part["source"] for part in manifest["slices"]} | {manifest["reference"]["source"]}

    assert named == {path.name for path in folder.glob("*.h5ad")}


def test_manifest_has_the_sections_that_build_needs(folder: Path) -> None:
    manifest = tomllib.loads((folder / "atlas.toml").read_text())

    assert manifest["atlas"] == {"name": "simulated", "data": "."}
    assert manifest["reference"]["source"] == "reference.h5ad"
    assert manifest["reference"]["organism"] == "mouse"
    assert manifest["reference"]["label_key"] == "cell_type_coarse"
    assert manifest["settings"] == {"embedder": {"name": "reference"}}
    assert manifest["slices"][0] == {
        "source": "simfish_1.h5ad",
        "slice_id": "simfish_1",
        "technology": "SimFISH",
        "organism": "mouse",
        "coordinate_unit": "micrometer",
        "label_key": "cell_type_coarse",
    }


def test_no_temporary_file_is_left(folder: Path) -> None:
    assert not [path.name for path in folder.iterdir() if path.suffix not in (".h5ad", ".toml")]


@pytest.mark.parametrize(("n_cells", "n_slices"), [(10, 1), (43, 4), (97, 9)])
def test_cells_are_split_exactly_and_evenly(tmp_path: Path, n_cells: int, n_slices: int) -> None:
    manifest = tomllib.loads(simulate(tmp_path / "new" / "folder", n_cells=n_cells, n_slices=n_slices).read_text())
    sizes = [ad.read_h5ad(tmp_path / "new" / "folder" / part["source"]).n_obs for part in manifest["slices"]]

    assert len(sizes) == n_slices
    assert sum(sizes) == n_cells
    assert max(sizes) - min(sizes) <= 1


def test_slices_cycle_over_the_platforms(tmp_path: Path) -> None:
    manifest = tomllib.loads(simulate(tmp_path, n_cells=60, n_slices=6).read_text())

    technologies = [part["technology"] for part in manifest["slices"]]
    assert technologies == [PLATFORMS[s % 4].name for s in range(6)]
    assert [part["slice_id"] for part in manifest["slices"]] == [*IDS, "simfish_2", "simmap_2"]


def test_two_slices_of_one_platform_share_their_panel_but_not_their_cells(tmp_path: Path) -> None:
    simulate(tmp_path, n_cells=500, n_slices=5)
    first, second = (ad.read_h5ad(tmp_path / f"simfish_{i}.h5ad") for i in (1, 2))

    assert first.var_names.equals(second.var_names)
    assert (first.X != second.X).nnz > 0
    assert not np.array_equal(first.obsm["spatial"], second.obsm["spatial"])


def test_progress_grows_to_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    simulate(tmp_path, n_cells=100, n_slices=4, progress=lambda done, total: seen.append((done, total)))

    done = [step for step, _ in seen]
    assert done == sorted(done)
    assert seen[-1] == (700, 700)


@pytest.mark.parametrize(
    "arguments",
    [{"n_slices": 0}, {"n_slices": -1}, {"n_cells": 39, "n_slices": 4}, {"n_cells": 0}, {"random_state": -1}],
)
def test_unusable_arguments_are_refused_before_anything_is_written(tmp_path: Path, arguments: dict) -> None:
    with pytest.raises(InputError):
        simulate(tmp_path / "out", **arguments)

    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")

    with pytest.raises(InputError, match="name a folder"):
        simulate(tmp_path / "out")

    assert (tmp_path / "out").read_text() == "mine"


# the random state


def test_equal_seeds_give_equal_contents(folder: Path, tmp_path: Path) -> None:
    again = simulate(tmp_path, n_cells=N_CELLS, n_slices=4).parent

    for path in sorted(folder.glob("*.h5ad")):
        assert same_contents(ad.read_h5ad(path), ad.read_h5ad(again / path.name)), path.name
    assert (folder / "atlas.toml").read_text() == (again / "atlas.toml").read_text()


def test_another_seed_changes_every_file(tmp_path: Path) -> None:
    first = simulate(tmp_path / "a", n_cells=400, random_state=1).parent
    second = simulate(tmp_path / "b", n_cells=400, random_state=2).parent

    for path in sorted(first.glob("*.h5ad")):
        one, two = ad.read_h5ad(path), ad.read_h5ad(second / path.name)
        assert (one.X != two.X).nnz > 0, path.name


def test_writing_twice_into_one_folder_replaces_the_files(tmp_path: Path) -> None:
    simulate(tmp_path, n_cells=80, random_state=1)
    simulate(tmp_path, n_cells=40, random_state=2)

    assert ad.read_h5ad(tmp_path / "simfish_1.h5ad").n_obs == 10


# counts


@pytest.mark.parametrize("name", [*IDS, "reference"])
def test_counts_are_non_negative_integers_in_float32(folder: Path, name: str) -> None:
    X = ad.read_h5ad(folder / f"{name}.h5ad").X

    assert X.format == "csr"
    assert X.dtype == np.float32
    assert X.has_canonical_format
    assert (X.data >= 1).all()
    assert np.array_equal(X.data, np.rint(X.data))


@pytest.mark.parametrize(("slice_id", "platform"), list(zip(IDS, PLATFORMS, strict=True)))
def test_share_of_zeros_is_the_platforms(slices: dict[str, ad.AnnData], slice_id: str, platform) -> None:
    zeros = float((gene_counts(slices[slice_id]) == 0).mean())

    assert abs(zeros - platform.zero_fraction) < 0.03


def test_platforms_differ_in_depth(slices: dict[str, ad.AnnData], reference: ad.AnnData) -> None:
    median = {name: float(np.median(gene_counts(adata).sum(axis=1))) for name, adata in slices.items()}

    assert median["simish_1"] < 20 < 60 < min(median["simmap_1"], median["simfish_plus_1"], median["simfish_1"])
    assert float(np.median(gene_counts(reference).sum(axis=1))) > max(median.values())


@pytest.mark.parametrize("slice_id", IDS)
def test_every_cell_has_a_count_in_a_gene_of_the_reference(slices: dict[str, ad.AnnData], slice_id: str) -> None:
    adata = slices[slice_id]
    known = [MODERN.get(name, name) in REFERENCE_GENES for name in adata.var_names]

    assert adata.X[:, known].sum(axis=1).min() >= 1


def test_counts_vary_more_than_poisson(slices: dict[str, ad.AnnData]) -> None:
    adata = slices["simfish_1"]
    astrocytes = adata[adata.obs["cell_type"] == "Astro", "Aqp4"].X.toarray()

    assert astrocytes.var() > 2.0 * astrocytes.mean()


def test_controls_are_nearly_silent(slices: dict[str, ad.AnnData]) -> None:
    adata = slices["simfish_plus_1"]
    control = adata.var_names.str.startswith("Blank-")

    assert 0 < adata.X[:, control].mean() < 0.1 * adata.X[:, ~control].mean()


def test_platforms_see_one_gene_differently(slices: dict[str, ad.AnnData]) -> None:
    share = [
        np.array([adata[:, [gene]].X.sum() for gene in CORE_GENES]) / adata[:, list(CORE_GENES)].X.sum()
        for adata in slices.values()
    ]

    assert all(np.abs(np.log(a / b)).max() > np.log(1.5) for a, b in combinations(share, 2))


# tissue


@pytest.mark.parametrize("slice_id", IDS)
def test_every_label_is_present(slices: dict[str, ad.AnnData], slice_id: str) -> None:
    obs = slices[slice_id].obs

    assert set(obs["cell_type"]) == set(CELL_TYPES)
    assert set(obs["cell_type_coarse"]) == set(COARSE_TYPES)
    assert set(obs["layer"]) == set(LAYERS)


def test_the_reference_has_every_label(reference: ad.AnnData) -> None:
    assert set(reference.obs["cell_type"]) == set(CELL_TYPES)
    assert set(reference.obs["cell_type_coarse"]) == set(COARSE_TYPES)


def test_the_reference_has_lost_its_space(reference: ad.AnnData) -> None:
    assert "spatial" not in reference.obsm
    assert not {"layer", "depth"} & set(reference.obs)


def test_the_reference_has_its_own_proportions(slices: dict[str, ad.AnnData], reference: ad.AnnData) -> None:
    def share(adata: ad.AnnData, name: str) -> float:
        return float((adata.obs["cell_type_coarse"] == name).mean())

    for adata in slices.values():
        assert share(reference, "Inhibitory") > 1.2 * share(adata, "Inhibitory")
        assert share(reference, "Oligodendrocyte") < 0.8 * share(adata, "Oligodendrocyte")


@pytest.mark.parametrize("slice_id", IDS)
def test_excitatory_types_lie_in_the_order_of_their_layers(slices: dict[str, ad.AnnData], slice_id: str) -> None:
    depth = slices[slice_id].obs.groupby("cell_type", observed=True)["depth"].mean()

    order = [depth[name] for name in ("L2/3 IT", "L4 IT", "L5 IT", "L6 CT", "L6b")]
    assert order == sorted(order)
    assert min(np.diff(order)) > 0.05


@pytest.mark.parametrize("slice_id", IDS)
def test_white_matter_is_rich_in_oligodendrocytes(slices: dict[str, ad.AnnData], slice_id: str) -> None:
    obs = slices[slice_id].obs
    oligodendrocyte = obs["cell_type_coarse"] == "Oligodendrocyte"
    white = obs["layer"] == "WM"

    assert oligodendrocyte[white].mean() > 4.0 * oligodendrocyte[~white].mean()


@pytest.mark.parametrize("slice_id", IDS)
def test_layers_lie_along_a_straight_axis_of_the_coordinates(slices: dict[str, ad.AnnData], slice_id: str) -> None:
    adata = slices[slice_id]
    design = np.column_stack([adata.obsm["spatial"], np.ones(adata.n_obs)])
    depth = adata.obs["depth"].to_numpy()
    fitted = design @ np.linalg.lstsq(design, depth, rcond=None)[0]

    assert np.corrcoef(fitted, depth)[0, 1] > 0.97


def test_slices_lie_differently_on_the_stage(slices: dict[str, ad.AnnData]) -> None:
    centres = [adata.obsm["spatial"].mean(axis=0) for adata in slices.values()]

    assert all(np.linalg.norm(a - b) > 50.0 for a, b in combinations(centres, 2))


@pytest.mark.parametrize("slice_id", IDS)
def test_density_is_that_of_cortex(slices: dict[str, ad.AnnData], slice_id: str) -> None:
    spatial = slices[slice_id].obsm["spatial"]

    assert spatial.dtype == np.float32
    assert 100.0 < ConvexHull(spatial).volume / len(spatial) < 160.0


@pytest.mark.parametrize("slice_id", IDS)
def test_no_two_cells_are_at_one_place(slices: dict[str, ad.AnnData], slice_id: str) -> None:
    distance, _ = cKDTree(slices[slice_id].obsm["spatial"]).query(slices[slice_id].obsm["spatial"], k=2)

    assert distance[:, 1].min() > 0.01


@pytest.mark.parametrize(
    ("slice_id", "label_key", "floor"),
    [
        ("simfish_plus_1", "cell_type_coarse", 0.75),
        ("simfish_plus_1", "cell_type", 0.75),
        ("simfish_1", "cell_type_coarse", 0.60),
        ("simmap_1", "cell_type_coarse", 0.60),
        ("simish_1", "cell_type_coarse", 0.25),
    ],
)
def test_labels_can_be_told_from_the_counts(
    slices: dict[str, ad.AnnData], reference: ad.AnnData, slice_id: str, label_key: str, floor: float
) -> None:
    assert balanced_accuracy(reference, slices[slice_id], label_key) > floor


def test_the_sparsest_platform_is_the_hardest(slices: dict[str, ad.AnnData], reference: ad.AnnData) -> None:
    accuracy = {name: balanced_accuracy(reference, adata, "cell_type_coarse") for name, adata in slices.items()}

    assert min(accuracy, key=lambda name: accuracy[name]) == "simish_1"


@pytest.mark.parametrize("types", [types for types, _ in PROGRAMMES if len(types) == 1], ids=lambda types: types[0])
def test_markers_are_strongest_in_their_type(reference: ad.AnnData, types: tuple[str, ...]) -> None:
    markers = next(text for own, text in PROGRAMMES if own == types).split()
    score = np.asarray(reference[:, markers].X.sum(axis=1)).ravel() / np.asarray(reference.X.sum(axis=1)).ravel()

    mean = reference.obs.assign(score=score).groupby("cell_type", observed=True)["score"].mean()
    assert mean.idxmax() == types[0]


# names


def test_cell_names_are_unique_over_the_atlas(slices: dict[str, ad.AnnData]) -> None:
    names = [name for adata in slices.values() for name in adata.obs_names]

    assert len(set(names)) == N_CELLS


def test_metadata_says_what_the_slice_is(slices: dict[str, ad.AnnData]) -> None:
    adata = slices["simmap_1"]

    assert adata.uns["source"]["unit"] == "micrometer"
    assert list(adata.obs) == ["slice", "technology", "cell_type", "cell_type_coarse", "layer", "depth"]
    assert set(adata.obs["slice"]) == {"simmap_1"}
    assert set(adata.obs["technology"]) == {"SimMAP"}


def test_reference_size_follows_the_atlas(reference: ad.AnnData) -> None:
    assert reference.shape == (3000, len(REFERENCE_GENES))
    assert set(reference.obs["technology"]) == {DISSOCIATED.name}


# memory


def test_memory_does_not_grow_with_the_slice(tmp_path: Path) -> None:
    def peak(n_cells: int) -> int:
        tracemalloc.start()
        try:
            simulate(tmp_path / str(n_cells), n_cells=n_cells, n_slices=1)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(40_000) < 1.1 * peak(10_000)

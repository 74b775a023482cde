"""Positives, negatives, conserved neighbours and chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lloki_atlas.errors import InputError
from lloki_atlas.models.mutual import mutual_neighbors
from lloki_atlas.models.pairs import (
    MIN_PLATFORM_CELLS,
    Triplets,
    balanced_chunks,
    chunk_neighbors,
    distant_cells,
    find_triplets,
    in_order,
    nearest_pairs,
    random_negatives,
)


def latents(n: int, d: int = 8, *, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((n, d), dtype=np.float32))


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def mutual_pairs(z: torch.Tensor, *, platform: np.ndarray, n_neighbors: int, **options):
    """Anchors and their nearest mutual neighbours in each other platform."""
    return nearest_pairs(mutual_neighbors(z, platform=platform, n_neighbors=n_neighbors), len(platform), **options)


def test_triplets_of_unequal_length_are_refused():
    with pytest.raises(InputError, match="as many"):
        Triplets(np.arange(2), np.arange(2), np.arange(3))


def test_every_platform_anchors():
    platform = np.repeat(np.arange(3), 20)
    anchors, positives = mutual_pairs(latents(60), platform=platform, n_neighbors=10)
    assert set(platform[anchors]) == set(platform[positives]) == {0, 1, 2}


def test_positives_are_of_another_platform():
    platform = np.repeat(np.arange(3), 20)
    anchors, positives = mutual_pairs(latents(60), platform=platform, n_neighbors=10)
    assert (platform[anchors] != platform[positives]).all()


def test_an_anchor_has_at_most_one_positive_in_each_other_platform():
    platform = np.repeat(np.arange(3), 20)
    anchors, positives = mutual_pairs(latents(60), platform=platform, n_neighbors=10)
    assert len(np.unique(np.stack([anchors, platform[positives]]), axis=1).T) == len(anchors)


def test_one_platform_has_no_pairs():
    anchors, positives = mutual_pairs(latents(10), platform=np.zeros(10, np.int64), n_neighbors=3)
    assert len(anchors) == len(positives) == 0


def test_more_neighbours_than_cells_are_clamped():
    platform = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    anchors, _ = mutual_pairs(latents(8), platform=platform, n_neighbors=40)
    assert sorted(anchors) == list(range(8))


def test_a_latent_of_zeros_has_no_mutual_neighbours():
    z = latents(8)
    z[0] = 0
    anchors, positives = mutual_pairs(z, platform=np.repeat([0, 1], 4), n_neighbors=4)
    assert 0 not in anchors
    assert 0 not in positives


def test_opposite_latents_are_no_neighbours():
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    anchors, _ = mutual_pairs(z, platform=np.array([0, 1]), n_neighbors=1)
    assert len(anchors) == 0


def test_the_nearest_mutual_neighbour_is_chosen_and_the_smaller_row_on_a_tie():
    z = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.1], [1.0, 0.1]])
    anchors, positives = mutual_pairs(z, platform=np.array([0, 1, 1, 1]), n_neighbors=3)
    assert positives[anchors == 0].tolist() == [2]


def test_length_of_a_latent_does_not_matter():
    z, platform = latents(30), np.repeat([0, 1], 15)
    # powers of two scale without rounding
    scaled = z * (2.0 ** torch.arange(30).remainder(5))[:, None]
    for one, other in zip(
        mutual_pairs(z, platform=platform, n_neighbors=5),
        mutual_pairs(scaled, platform=platform, n_neighbors=5),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12))
def test_permuting_cells_permutes_mutual_pairs(seed: int, k: int):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(24, 8)).astype(np.float32)
    unit = z.astype(np.float64) / np.linalg.norm(z, axis=1, keepdims=True)
    # a product's last bits depend on where its rows stand: ties that only they decide are no matter of order
    assume(np.diff(np.sort(unit @ unit.T, axis=1), axis=1).min() > 1e-6)
    platform = rng.integers(0, 3, 24)
    order = rng.permutation(24)
    first = mutual_pairs(torch.from_numpy(z), platform=platform, n_neighbors=k)
    second = mutual_pairs(torch.from_numpy(z[order]), platform=platform[order], n_neighbors=k)
    assert set(zip(*first, strict=True)) == set(zip(order[second[0]], order[second[1]], strict=True))


def test_labels_drop_positives_of_another_label():
    platform, labels = np.repeat([0, 1], 30), np.tile([0, 1, 2], 20)
    free = mutual_pairs(latents(60), platform=platform, n_neighbors=10)
    bound = mutual_pairs(latents(60), platform=platform, n_neighbors=10, labels=labels)
    assert (labels[free[0]] != labels[free[1]]).any()
    assert len(bound[0]) > 0
    assert (labels[bound[0]] == labels[bound[1]]).all()


def test_unknown_labels_change_nothing():
    platform = np.repeat([0, 1], 20)
    columns = {"platform": platform, "slice_codes": platform, "n_neighbors": 5}
    free = find_triplets(latents(40), **columns, generator=generator())
    unknown = find_triplets(latents(40), **columns, generator=generator(), labels=np.full(40, -1))
    np.testing.assert_array_equal(free.positives, unknown.positives)
    np.testing.assert_array_equal(free.negatives, unknown.negatives)


def test_labels_make_negatives_the_nearest_cell_of_another_label():
    platform, labels = np.repeat([0, 1], 20), np.tile([0, 1], 20)
    triplets = find_triplets(
        latents(40), platform=platform, slice_codes=platform, n_neighbors=5, generator=generator(), labels=labels
    )
    assert len(triplets) > 0
    assert (labels[triplets.negatives] != labels[triplets.anchors]).all()
    assert (platform[triplets.negatives] == platform[triplets.anchors]).all()


def test_a_slice_of_one_label_keeps_random_negatives():
    platform = np.repeat([0, 1], 20)
    columns = {"platform": platform, "slice_codes": platform, "n_neighbors": 5}
    free = find_triplets(latents(40), **columns, generator=generator())
    one = find_triplets(latents(40), **columns, generator=generator(), labels=np.zeros(40, np.int64))
    np.testing.assert_array_equal(free.negatives, one.negatives)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_negatives_are_other_cells_of_the_same_slice(seed: int):
    rng = np.random.default_rng(seed)
    slices = np.concatenate([np.repeat(rng.choice(100, 4, replace=False), 2), rng.integers(0, 3, 10)])
    rng.shuffle(slices)
    shared = np.flatnonzero(np.isin(slices, [code for code in slices if (slices == code).sum() > 1]))
    negatives = random_negatives(shared, groups=slices, generator=rng)
    assert (slices[negatives] == slices[shared]).all()
    assert (negatives != shared).all()


def test_every_other_cell_of_the_slice_can_be_the_negative():
    slices = np.array([5, 3, 5, 5, 3, 5])
    negatives = random_negatives(np.full(500, 2), groups=slices, generator=generator())
    counts = np.bincount(negatives, minlength=6)
    assert set(np.flatnonzero(counts)) == {0, 3, 5}
    assert counts[[0, 3, 5]].min() > 120


def test_the_anchor_itself_is_drawn_only_where_it_may_be():
    slices = np.array([5, 3, 5, 5, 3, 5])
    drawn = random_negatives(np.full(500, 2), groups=slices, generator=generator(), itself=True)
    counts = np.bincount(drawn, minlength=6)
    assert set(np.flatnonzero(counts)) == {0, 2, 3, 5}
    assert counts[[0, 2, 3, 5]].min() > 90


def test_published_pairs_anchor_in_the_lower_platform_and_push_within_it():
    platform = np.repeat([2, 0, 1], 20)
    columns = {"platform": platform, "slice_codes": np.arange(60) % 7, "n_neighbors": 8}
    both = find_triplets(latents(60), **columns, generator=generator())
    published = find_triplets(latents(60), **columns, generator=generator(), pairing="published")
    assert (platform[published.anchors] < platform[published.positives]).all()
    assert (platform[published.negatives] == platform[published.anchors]).all()
    pairs = list(zip(both.anchors, both.positives, strict=True))
    lower = {(a, p) for a, p in pairs if platform[a] < platform[p]}
    assert set(zip(published.anchors, published.positives, strict=True)) == lower
    assert 0 < len(published) == len(lower) < len(both)


def test_pairs_of_another_space_are_taken_as_they_are():
    platform = np.repeat([0, 1], 20)
    columns = {"platform": platform, "slice_codes": platform, "n_neighbors": 5}
    elsewhere = mutual_neighbors(latents(40, seed=5), platform=platform, n_neighbors=5)
    found = find_triplets(latents(40), **columns, generator=generator(), mutual=elsewhere)
    expected = find_triplets(latents(40, seed=5), **columns, generator=generator())
    np.testing.assert_array_equal(found.positives, expected.positives)


def test_the_only_cell_of_a_slice_is_no_anchor():
    platform = np.repeat([0, 1], 5)
    slices = np.array([0, 0, 0, 0, 7, 1, 1, 1, 1, 8])
    triplets = find_triplets(latents(10), platform=platform, slice_codes=slices, n_neighbors=10, generator=generator())
    assert not set(triplets.anchors) & {4, 9}
    assert set(triplets.anchors) == {0, 1, 2, 3, 5, 6, 7, 8}


def test_equal_keys_draw_equal_negatives():
    platform = np.repeat([0, 1], 20)
    drawn = [
        find_triplets(latents(40), platform=platform, slice_codes=platform, n_neighbors=5, generator=generator(seed))
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(drawn[0].negatives, drawn[1].negatives)
    assert (drawn[0].negatives != drawn[2].negatives).any()


def test_conserved_neighbours_stay_in_their_slice_and_exclude_the_cell():
    groups = np.random.default_rng(0).integers(0, 4, 50)
    neighbors, _ = chunk_neighbors(latents(50), groups=groups, n_neighbors=6)
    cell, column = np.nonzero(neighbors >= 0)
    assert (groups[neighbors[cell, column]] == groups[cell]).all()
    assert (neighbors[cell, column] != cell).all()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_small_slices_have_fewer_conserved_neighbours(size: int):
    neighbors, distances = chunk_neighbors(latents(size), groups=np.zeros(size, np.int64), n_neighbors=6)
    assert ((neighbors >= 0).sum(axis=1) == size - 1).all()
    assert (distances[neighbors < 0] == 0).all()


def test_identical_cells_have_distance_zero():
    x = torch.ones(5, 512) / 512**0.5
    _, distances = chunk_neighbors(x, groups=np.zeros(5, np.int64), n_neighbors=4)
    assert (distances == 0).all()


PLATFORM = np.concatenate([np.zeros(700, np.int64), np.ones(300, np.int64), np.full(20, 2), np.full(3, 3)])


def chunks(seed: int = 0, chunk_cells: int = 200) -> list[np.ndarray]:
    return balanced_chunks(PLATFORM, chunk_cells=chunk_cells, generator=generator(seed))


def test_every_cell_is_in_a_chunk():
    assert set(np.concatenate(chunks())) == set(range(len(PLATFORM)))


def test_no_chunk_holds_a_cell_twice():
    assert all(len(set(rows)) == len(rows) for rows in chunks())


def test_chunks_hold_platforms_in_proportion():
    for rows in chunks():
        counts = np.bincount(PLATFORM[rows])
        assert 116 <= counts[0] <= 117
        assert counts[1] == 50


def test_small_platforms_are_whole_in_every_chunk():
    for rows in chunks():
        assert np.bincount(PLATFORM[rows])[2:].tolist() == [20, 3]


def test_a_platform_just_above_the_minimum_gives_it_to_every_chunk():
    platform = np.concatenate([np.zeros(1000, np.int64), np.ones(MIN_PLATFORM_CELLS + 1, np.int64)])
    drawn = balanced_chunks(platform, chunk_cells=100, generator=generator())
    assert {int((platform[rows] == 1).sum()) for rows in drawn} == {MIN_PLATFORM_CELLS}


def test_another_key_gives_other_chunks():
    assert not np.array_equal(chunks(0)[0], chunks(1)[0])


def test_a_sample_smaller_than_a_chunk_is_one_chunk():
    assert len(chunks(chunk_cells=5000)) == 1


def test_neighbours_are_put_in_order_with_the_missing_ones_last():
    neighbors, distances = np.array([[4, -1, 2, 3]]), np.array([[0.5, 0.0, 0.1, 0.1]], np.float32)
    found, near = in_order(neighbors, distances)
    assert found.tolist() == [[2, 3, 4, -1]]
    np.testing.assert_array_equal(near, np.array([[0.1, 0.1, 0.5, 0.0]], np.float32))


def test_distant_cells_are_other_cells_of_the_slice_at_their_distance():
    rng = np.random.default_rng(0)
    rows, groups = rng.normal(size=(60, 16)).astype(np.float32), rng.integers(0, 3, 60)
    cells, distances = distant_cells(rows, groups=groups, n_cells=4, generator=np.random.default_rng(1))
    assert cells.shape == (60, 4)
    assert (groups[cells] == groups[:, None]).all()
    assert (cells != np.arange(60)[:, None]).all()
    np.testing.assert_allclose(distances, np.linalg.norm(rows[:, None] - rows[cells], axis=2), atol=1e-5)
    again, _ = distant_cells(rows, groups=groups, n_cells=4, generator=np.random.default_rng(1))
    assert (again == cells).all()


def test_the_only_cell_of_a_slice_has_no_distant_cells():
    rows = np.eye(3, dtype=np.float32)
    cells, distances = distant_cells(rows, groups=np.array([0, 0, 1]), n_cells=2, generator=np.random.default_rng(0))
    assert cells.tolist() == [[1, 1], [0, 0], [-1, -1]]
    assert (distances[2] == 0).all()

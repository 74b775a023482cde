"""Adapting to a new platform: its token is trained, nothing else changes, and what does not belong is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.embeddings import draw_embeddings

from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.errors import InputError
from lloki_atlas.models import adaptation
from lloki_atlas.models.adaptation import MIN_CELLS, adapt_token
from lloki_atlas.models.adaptation_chunks import anchored, choose, draw, find_pairs, pair_latents
from lloki_atlas.models.adaptation_evidence import mixing
from lloki_atlas.models.encoder import FrozenEncoder
from lloki_atlas.models.platform_token import Token, only_token, token_of, with_token
from lloki_atlas.models.step import Chunk
from lloki_atlas.models.threads import torch_threads
from lloki_atlas.models.training import train_autoencoder_on

PLATFORMS = ["A|1", "B|2", "C|3"]
NEW = "D|4"
CONFIG = AutoencoderConfig(
    n_epochs=4, chunk_cells=240, n_neighbors_mutual=10, n_neighbors_mean=3, n_neighbors_conservation=5, n_distant=2
)


def cells_of(platform: int, n: int, *, code: int = 0, seed: int = 0, labels: bool = False) -> Chunk:
    """Cells of a platform in two slices."""
    values = draw_embeddings(n, platform, seed=seed).astype(np.float32)
    kinds = (np.arange(n) % 3).astype(np.int64) if labels else None
    return Chunk(values, np.full(n, code), 10 * platform + np.arange(n) % 2, kinds)


def joined(parts: list[Chunk]) -> Chunk:
    labels = [part.labels for part in parts]
    return Chunk(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("embeddings", "platform", "slice_codes")
        ),
        labels=None if labels[0] is None else np.concatenate(labels),
    )


ATLAS = joined([cells_of(code, 120, code=code) for code in range(3)])
CELLS = cells_of(3, 120)


@pytest.fixture(scope="module")
def model():
    made, _ = train_autoencoder_on(
        ATLAS.embeddings, ATLAS.platform, ATLAS.slice_codes, PLATFORMS, config=CONFIG, n_threads=1
    )
    return made


@pytest.fixture(scope="module")
def adapted(model):
    return adapt(model)


def adapt(model, cells=CELLS, atlas=ATLAS, **options):
    return adapt_token(model, NEW, cells, atlas, **{"config": CONFIG, **options})


def numbers(found) -> bytes:
    return found.token.encoder.tobytes() + found.token.decoder.tobytes()


def weights(model) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def test_the_model_that_is_given_stays_as_it_is(model):
    before = weights(model)
    adapt(model)
    assert weights(model) == before
    assert model.platforms == tuple(PLATFORMS)


def test_a_model_with_the_token_has_the_bytes_of_the_model_in_all_else(model, adapted):
    grown = with_token(model, adapted.token)
    before, after = model.state_dict(), grown.state_dict()
    assert grown.platforms == (*PLATFORMS, NEW)
    assert before.keys() == after.keys()
    for name, value in before.items():
        kept = after[name][: len(value)] if "tokens" in name else after[name]
        assert kept.numpy().tobytes() == value.numpy().tobytes()
    assert after["encoder_tokens.weight"][-1].numpy().tobytes() == adapted.token.encoder.tobytes()
    assert after["decoder_tokens.weight"][-1].numpy().tobytes() == adapted.token.decoder.tobytes()


def test_nothing_but_the_token_can_be_trained(model):
    own = only_token(model, NEW)
    trained = {name for name, value in own.named_parameters() if value.requires_grad}
    assert trained == {"encoder_tokens.weight", "decoder_tokens.weight"}
    assert sum(value.numel() for value in own.parameters() if value.requires_grad) == 20


def test_a_token_begins_as_the_mean_of_those_there_are(model):
    token = token_of(only_token(model, NEW))
    np.testing.assert_allclose(token.encoder, model.encoder_tokens.weight.detach().mean(dim=0), atol=1e-6)
    np.testing.assert_allclose(token.decoder, model.decoder_tokens.weight.detach().mean(dim=0), atol=1e-6)


def test_both_halves_of_the_token_are_trained(model, adapted):
    mean = token_of(only_token(model, NEW))
    assert np.abs(adapted.token.encoder - mean.encoder).max() > 0.05
    assert np.abs(adapted.token.decoder - mean.decoder).max() > 0.05


def test_the_losses_become_smaller(adapted):
    assert [part["epoch"] for part in adapted.history] == list(range(1, adaptation.N_EPOCHS + 1))
    assert adapted.history[-1]["total"] < adapted.history[0]["total"]
    assert all(part["n_triplets"] > 0 for part in adapted.history)


def test_what_is_measured_is_written_down(adapted):
    evidence = adapted.evidence
    assert evidence["moved"] > 0.02
    assert 0 <= evidence["mixing_before"] <= 4 / 3
    assert 0 <= evidence["mixing"] <= 4 / 3
    assert 0 < evidence["paired"] <= 1
    assert 0 < evidence["similarity"] <= 1
    assert (evidence["n_cells"], evidence["n_atlas_cells"]) == (120, 360)


def test_cells_of_the_atlas_are_encoded_with_the_token_as_without(model, adapted):
    with_it, without = FrozenEncoder(with_token(model, adapted.token)), FrozenEncoder(model)
    for name in PLATFORMS:
        np.testing.assert_allclose(
            with_it.encode(ATLAS.embeddings[:50], name), without.encode(ATLAS.embeddings[:50], name), atol=1e-5
        )


@pytest.mark.parametrize("n_threads", [1, 3])
def test_the_same_cells_give_the_same_bytes_on_any_number_of_threads(model, adapted, n_threads):
    with torch_threads(n_threads):
        again = adapt(model)
    assert numbers(again) == numbers(adapted)
    assert (again.history, again.evidence) == (adapted.history, adapted.evidence)


def test_another_seed_gives_another_token(model, adapted):
    assert numbers(adapt(model, random_state=1)) != numbers(adapted)


def test_the_global_random_state_is_neither_read_nor_changed(model, adapted):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    assert numbers(adapt(model)) == numbers(adapted)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_cells_without_an_embedding_are_left_out(model, adapted, value):
    holes = cells_of(3, 3)
    holes.embeddings[:, 7] = value
    found = adapt(model, joined([CELLS, holes]))
    assert numbers(found) == numbers(adapted)
    assert found.evidence["n_cells"] == 120


def whole(model, cells=CELLS, atlas=ATLAS, **settings):
    """All cells as one chunk, in their order, without means."""
    config = dataclasses.replace(CONFIG, n_neighbors_mean=0, **settings)
    drawn = draw(cells, anchored(model, atlas), config, np.random.default_rng(0))
    return dataclasses.replace(drawn, cells=cells, atlas=anchored(model, atlas)), config


@pytest.mark.parametrize("space", ["latent", "embedding"])
def test_pairs_are_the_nearest_mutual_neighbours_in_the_space_that_the_settings_say(model, space):
    drawn, config = whole(model, pair_space=space)
    latents = torch.rand(120, 128, generator=torch.Generator().manual_seed(0))
    anchors, positives = find_pairs(latents, drawn, config)
    new, old = (latents, drawn.atlas.latents) if space == "latent" else (CELLS.embeddings, ATLAS.embeddings)
    expected = set()
    for code in range(3):
        members = np.flatnonzero(ATLAS.platform == code)
        cosines = unit(new) @ unit(np.asarray(old)[members]).T
        # the k-th largest of a row and of a column
        rows, columns = -np.sort(-cosines, axis=1)[:, 9], -np.sort(-cosines, axis=0)[9]
        mutual = np.where((cosines >= rows[:, None]) & (cosines >= columns) & (cosines > 0), cosines, -np.inf)
        found = np.flatnonzero(np.isfinite(mutual.max(axis=1)))
        expected |= {(int(row), int(members[mutual[row].argmax()])) for row in found}
    assert set(zip(anchors.tolist(), positives.tolist(), strict=True)) == expected


def unit(rows) -> np.ndarray:
    values = np.asarray(rows, dtype=np.float64)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_positives_of_another_label_are_none(model):
    cells = cells_of(3, 120, labels=True)
    atlas = joined([cells_of(code, 120, code=code, labels=True) for code in range(3)])
    drawn, config = whole(model, cells, atlas, pair_space="embedding")
    anchors, positives = find_pairs(torch.zeros(120, 128), drawn, config)
    assert len(anchors)
    np.testing.assert_array_equal(cells.labels[anchors], atlas.labels[positives])


def test_pairs_are_searched_and_pulled_between_means_of_cells_and_their_nearest(model):
    drawn = draw(CELLS, anchored(model, ATLAS), CONFIG, np.random.default_rng(0))
    latents = torch.rand(len(drawn.cells.embeddings), 128, generator=torch.Generator().manual_seed(0))
    sides = (latents, drawn.cells), (drawn.atlas.latents, drawn.atlas.cells)
    for found, (rows, cells) in zip(pair_latents(latents, drawn), sides, strict=True):
        apart = np.linalg.norm(cells.embeddings[:, None] - cells.embeddings[None], axis=2)
        apart[cells.slice_codes[:, None] != cells.slice_codes[None]] = np.inf
        nearest = np.argsort(apart, axis=1)[:, :4]  # itself and three others
        np.testing.assert_allclose(found.numpy(), rows.numpy()[nearest].mean(axis=1), atol=1e-5)


@pytest.mark.parametrize("n_distant", [0, 2])
def test_distances_are_conserved_to_the_nearest_and_to_some_distant_cells_of_the_slice(model, n_distant):
    config = dataclasses.replace(CONFIG, n_distant=n_distant)
    drawn = draw(CELLS, anchored(model, ATLAS), config, np.random.default_rng(0))
    cells = drawn.cells
    assert drawn.conserved.shape == (len(cells.embeddings), 5 + n_distant)
    assert (cells.slice_codes[drawn.conserved] == cells.slice_codes[:, None]).all()
    found = np.linalg.norm(cells.embeddings[drawn.conserved] - cells.embeddings[:, None], axis=2)
    np.testing.assert_allclose(drawn.distances, found, atol=1e-5)


@pytest.mark.parametrize("negatives", ["none", "slice"])
def test_with_and_without_negatives_a_token_is_found(model, negatives):
    found = adapt(model, config=dataclasses.replace(CONFIG, negatives=negatives))
    assert found.history[-1]["total"] < found.history[0]["total"]
    assert all(part["n_triplets"] > 0 for part in found.history)


@pytest.mark.parametrize("negatives", ["none", "slice"])
def test_labels_change_the_token(model, negatives):
    config = dataclasses.replace(CONFIG, negatives=negatives)
    cells = cells_of(3, 120, labels=True)
    atlas = joined([cells_of(code, 120, code=code, labels=True) for code in range(3)])
    assert numbers(adapt(model, cells, atlas, config=config)) != numbers(adapt(model, config=config))


def test_unknown_labels_change_nothing(model, adapted):
    cells, atlas = (dataclasses.replace(part, labels=np.full(len(part.platform), -1)) for part in (CELLS, ATLAS))
    assert numbers(adapt(model, cells, atlas)) == numbers(adapted)


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 120), st.integers(4, 400))
def test_a_chunk_has_equally_many_cells_of_each_platform_as_far_as_there_are(n_new, chunk_cells):
    config = dataclasses.replace(CONFIG, chunk_cells=chunk_cells)
    share = max(50, chunk_cells // 4)
    known = adaptation.Anchored(ATLAS, torch.from_numpy(ATLAS.embeddings[:, :128].copy()))
    drawn = draw(choose(CELLS, np.arange(n_new)), known, config, np.random.default_rng(0))
    others = drawn.atlas
    assert len(drawn.cells.embeddings) == min(n_new, share)
    np.testing.assert_array_equal(np.bincount(others.cells.platform), np.full(3, min(120, share)))
    assert others.latents.numpy().tobytes() == others.cells.embeddings[:, :128].tobytes()


def test_no_cell_is_drawn_twice_into_a_chunk():
    known = adaptation.Anchored(ATLAS, torch.zeros(360, 128))
    drawn = draw(CELLS, known, CONFIG, np.random.default_rng(1))
    for cells in (drawn.cells, drawn.atlas.cells):
        assert len(np.unique(cells.embeddings, axis=0)) == len(cells.embeddings)


def test_latents_of_the_atlas_are_those_of_its_encoder(model):
    order = np.random.default_rng(0).permutation(360)
    known = anchored(model, choose(ATLAS, order))
    encoder = FrozenEncoder(model)
    for code, name in enumerate(PLATFORMS):
        rows = np.flatnonzero(ATLAS.platform[order] == code)
        expected = encoder.encode(ATLAS.embeddings[order][rows], name)
        np.testing.assert_array_equal(known.latents.numpy()[rows], expected)


# what is refused


def test_random_embeddings_are_refused_with_what_was_measured(model):
    values = np.random.default_rng(0).normal(size=(200, 512)).astype(np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    random = Chunk(values, np.zeros(200, np.int64), np.zeros(200, np.int64))
    with pytest.raises(
        InputError, match=r"'D\|4' shares no structure with the atlas: -?0\.0\d with .* at least 0\.\d\d"
    ):
        adapt(model, random)


def test_a_platform_that_the_model_knows_is_refused(model):
    with pytest.raises(InputError, match=r"'B\|2' already has a token: training makes a new model"):
        adapt_token(model, "B|2", CELLS, ATLAS, config=CONFIG)


@pytest.mark.filterwarnings("ignore:platform")
def test_ten_cells_are_adapted_to_with_a_warning(model):
    few = choose(CELLS, np.arange(MIN_CELLS))
    with pytest.warns(UserWarning, match="has 10 cells, fewer than n_neighbors_mutual = 40: all are searched"):
        found = adapt(model, few, config=dataclasses.replace(CONFIG, n_neighbors_mutual=40))
    assert found.evidence["n_cells"] == 10
    assert np.isfinite(found.token.encoder).all()


def test_fewer_cells_are_refused(model):
    with pytest.raises(
        InputError, match=r"'D\|4' has 9 cells with an embedding, adapting needs 10: add cells, or stop"
    ):
        adapt(model, choose(CELLS, np.arange(MIN_CELLS - 1)))


def test_an_atlas_without_cells_is_refused(model):
    with pytest.raises(InputError, match=r"no cells to adapt 'D\|4' to: train a new model"):
        adapt(model, atlas=choose(ATLAS, np.empty(0, np.int64)))


def test_cells_on_the_far_side_of_the_origin_have_no_mutual_neighbour(model):
    # the same kinds of cells, but no cosine is positive: the structure is there, the pairs are not
    shift = np.full(512, 3.0, np.float32)
    atlas = dataclasses.replace(ATLAS, embeddings=ATLAS.embeddings + shift)
    cells = dataclasses.replace(CELLS, embeddings=CELLS.embeddings - shift)
    with pytest.raises(InputError, match=r"no cell of 'D\|4' has a mutual neighbour in the atlas: check gene symbols"):
        adapt(model, cells, atlas, config=dataclasses.replace(CONFIG, pair_space="embedding"))


def test_losses_that_are_not_finite_are_refused(model):
    with pytest.raises(InputError, match=r"adapting to 'D\|4' diverged in epoch 1"):
        adapt(model, config=dataclasses.replace(CONFIG, reconstruction_weight=1e300))


def test_progress_is_told_after_each_epoch(model, adapted):
    seen = []
    adapt(model, progress=lambda *told: seen.append(told))
    assert [(epoch, n) for epoch, n, _ in seen] == [(epoch, 10) for epoch in range(1, 11)]
    assert [losses for _, _, losses in seen] == adapted.history


# mixing


def test_cells_of_a_platform_that_is_shifted_as_others_are_move_towards_the_atlas(model):
    # a token shifts the first layer along ten directions: along those in which it has moved the platforms it knows
    before = token_of(only_token(model, NEW))
    shifted = with_token(model, Token(NEW, model.encoder_tokens.weight[0].detach().numpy(), before.decoder))
    cells = cells_of(0, 120, seed=9)
    found = adapt(model, cells)
    known = anchored(model, choose(ATLAS, np.flatnonzero(ATLAS.platform != 0))).latents
    distances = [
        torch.cdist(torch.from_numpy(FrozenEncoder(one).encode(cells.embeddings, NEW)), known).min(dim=1).values.mean()
        for one in (with_token(model, before), with_token(model, found.token), shifted)
    ]
    assert distances[1] < distances[0]


def test_mixing_is_one_where_the_order_is_random_and_zero_where_the_sides_are_apart():
    rows = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    assert abs(mixing(rows[:200], rows[200:]) - 1) < 0.1
    apart = torch.nn.functional.one_hot(torch.arange(2)).float()
    assert mixing(apart[0] + 0.01 * rows[:200, :2], apart[1] + 0.01 * rows[200:, :2]) == 0


def test_a_token_is_the_row_of_a_model_that_knows_one_platform():
    token = Token("x|y", np.arange(10, dtype=np.float32), -np.arange(10, dtype=np.float32))
    from lloki_atlas.models.autoencoder import ConditionalAutoencoder

    own = only_token(with_token(ConditionalAutoencoder(["a|b"]), token), "z|w")
    assert token_of(own).platform == "z|w"
    assert own.platforms == ("z|w",)

"""One update: the same losses and gradients as autograd over the whole chunk, the same bytes on any threads."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lloki_atlas.config import AutoencoderConfig
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.losses import conservation_loss, reconstruction_loss, triplet_loss
from lloki_atlas.models.mutual import mutual_neighbors
from lloki_atlas.models.pairs import chunk_neighbors, find_triplets
from lloki_atlas.models.step import LOSSES, MODEL_ROWS, Chunk, TrainingStep
from lloki_atlas.models.threads import single_thread

CONFIG = AutoencoderConfig(preset="paper", conservation_weight=1.0, n_neighbors_mutual=10, n_neighbors_conservation=5)


def chunk(*sizes: int, seed: int = 0, labelled: bool = False) -> Chunk:
    """Types that every platform shows, each platform with so many cells in two slices."""
    rng = np.random.default_rng(seed)
    platform = np.repeat(np.arange(len(sizes)), sizes)
    types = rng.integers(0, 3, len(platform))
    values = rng.normal(size=(3, 512))[types] + 0.5 * rng.normal(size=(len(sizes), 512))[platform]
    values += 0.5 * rng.normal(size=values.shape)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    slices = 2 * platform + np.arange(len(platform)) % 2
    return Chunk(values.astype(np.float32), platform, slices, types if labelled else None)


def model(n_platforms: int = 3) -> ConditionalAutoencoder:
    return ConditionalAutoencoder([f"platform {code}" for code in range(n_platforms)])


def key(number: int = 0) -> np.random.Generator:
    return np.random.default_rng([7, number])


def bits(net: ConditionalAutoencoder) -> bytes:
    return b"".join(weight.detach().numpy().tobytes() for weight in net.parameters())


def plain_losses(net: ConditionalAutoencoder, cells: Chunk, config: AutoencoderConfig) -> dict[str, torch.Tensor]:
    """The losses as one graph of torch over the whole chunk."""
    x, platform = torch.from_numpy(cells.embeddings), torch.from_numpy(cells.platform)
    latents = net.encode(x, platform)
    space = x if config.pair_space == "embedding" else latents.detach()
    triplets = find_triplets(
        latents.detach(),
        platform=cells.platform,
        slice_codes=cells.slice_codes,
        n_neighbors=config.n_neighbors_mutual,
        generator=key(),
        labels=cells.labels,
        pairing=config.pairing,
        mutual=mutual_neighbors(space, platform=cells.platform, n_neighbors=config.n_neighbors_mutual),
    )
    rows = [torch.from_numpy(ends) for ends in (triplets.anchors, triplets.positives, triplets.negatives)]
    near = chunk_neighbors(x, groups=cells.slice_codes, n_neighbors=config.n_neighbors_conservation)
    found = {
        "reconstruction": reconstruction_loss(net.decode(latents, platform), x, equations=config.equations),
        "triplet": triplet_loss(latents, *rows, margin=config.margin, equations=config.equations),
        "conservation": conservation_loss(latents, *map(torch.from_numpy, near), equations=config.equations),
    }
    return {"total": sum(getattr(config, f"{name}_weight") * loss for name, loss in found.items()), **found}


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("pairing", ["symmetric", "published"])
@pytest.mark.parametrize("pair_space", ["latent", "embedding"])
@pytest.mark.parametrize("equations", ["code", "paper"])
def test_losses_and_gradients_are_those_of_one_graph(equations: str, pair_space: str, pairing: str, labelled: bool):
    config = dataclasses.replace(CONFIG, equations=equations, pair_space=pair_space, pairing=pairing)
    cells, net = chunk(MODEL_ROWS + 40, 60, 90, labelled=labelled), model()
    with single_thread():
        expected = plain_losses(net, cells, config)
        gradients = torch.autograd.grad(expected["total"], list(net.parameters()))
    with TrainingStep(net, config) as step:
        found = step.update(cells, key())
    for name in LOSSES:
        assert found[name] == pytest.approx(expected[name].item(), rel=1e-5)
    assert found["n_triplets"] > 20
    for weight, gradient in zip(net.parameters(), gradients, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-6 * gradient.abs().max().item() + 1e-9)


def test_losses_are_those_of_the_update_and_change_nothing():
    cells, net = chunk(80, 70, 60), model()
    before = bits(net)
    with TrainingStep(net, CONFIG) as step:
        first = step.losses(cells, key())
        assert bits(net) == before
        assert step.update(cells, key()) == first
        assert bits(net) != before
        assert step.losses(cells, key())["total"] < first["total"]


def test_updates_lower_the_loss():
    cells = chunk(80, 70, 60)
    with TrainingStep(model(), CONFIG) as step:
        totals = [step.update(cells, key(number))["total"] for number in range(30)]
    assert totals[-1] < 0.8 * totals[0]


@pytest.mark.parametrize("preset", ["default", "reference"])
def test_bytes_do_not_depend_on_the_number_of_threads(preset: str):
    config = dataclasses.replace(AutoencoderConfig(preset=preset), n_neighbors_mutual=10)
    cells, found = chunk(MODEL_ROWS + 100, MODEL_ROWS - 200, 40), []
    for n_threads in (1, 2, 3):
        net = model()
        with TrainingStep(net, config, n_threads=n_threads) as step:
            losses = [step.update(cells, key(number)) for number in range(3)]
        found.append((losses, bits(net)))
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_threads_of_torch_outside_do_not_matter():
    cells, found = chunk(MODEL_ROWS + 50, 200, 40), []
    before = torch.get_num_threads()
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        net = model()
        with TrainingStep(net, CONFIG) as step:
            step.update(cells, key())
        found.append(bits(net))
    torch.set_num_threads(before)
    assert found[0] == found[1]


@pytest.mark.parametrize("pair_space", ["latent", "embedding"])
def test_a_chunk_that_is_shown_again_gives_the_bytes_of_a_new_one(pair_space: str):
    config, found = dataclasses.replace(CONFIG, pair_space=pair_space), []
    for fresh in (False, True):
        cells, net = chunk(80, 70, 60), model()
        with TrainingStep(net, config) as step:
            for number in range(3):
                step.update(dataclasses.replace(cells) if fresh else cells, key(number))
        found.append(bits(net))
    assert found[0] == found[1]


@pytest.mark.parametrize("equations", ["code", "paper"])
def test_permuting_the_cells_changes_losses_by_rounding_only(equations: str):
    # with labels in every slice all negatives are the hard ones, which no draw decides
    cells = chunk(80, 70, 60, labelled=True)
    order = np.random.default_rng(1).permutation(210)
    permuted = Chunk(cells.embeddings[order], cells.platform[order], cells.slice_codes[order], cells.labels[order])
    config = dataclasses.replace(CONFIG, equations=equations)
    with TrainingStep(model(), config) as step:
        first, second = step.losses(cells, key()), step.losses(permuted, key(1))
    assert first["n_triplets"] == second["n_triplets"] > 20
    for name in LOSSES:
        assert second[name] == pytest.approx(first[name], rel=1e-5)


def test_an_anchor_is_never_its_own_negative():
    cells = chunk(40, 30, 20)
    z = torch.rand(90, 8, generator=torch.Generator().manual_seed(0))
    columns = {"platform": cells.platform, "slice_codes": cells.slice_codes, "n_neighbors": 20}
    for number in range(20):
        triplets = find_triplets(z, **columns, generator=key(number))
        assert (triplets.anchors != triplets.negatives).all()


@pytest.mark.parametrize("pairing", ["symmetric", "published"])
def test_one_platform_has_no_triplets_and_learns_the_rest(pairing: str):
    with TrainingStep(model(1), dataclasses.replace(CONFIG, pairing=pairing)) as step:
        totals = [step.update(chunk(90), key(number)) for number in range(2)]
    assert [losses["n_triplets"] for losses in totals] == [0, 0]
    assert [losses["triplet"] for losses in totals] == [0.0, 0.0]
    assert totals[1]["total"] < totals[0]["total"]


@pytest.mark.parametrize("pairing", ["symmetric", "published"])
@pytest.mark.parametrize("size", [1, 2, 10])
def test_a_small_platform_is_searched_as_a_whole(size: int, pairing: str):
    config = dataclasses.replace(CONFIG, n_neighbors_mutual=40, pairing=pairing)
    net = model(2)
    with TrainingStep(net, config) as step:
        losses = step.update(chunk(60, size), key())
    # every cell of the small platform is among the 40 nearest, so that whom it finds finds it
    assert losses["n_triplets"] >= (40 if pairing == "published" else 40 + (size > 3) * size)
    assert np.isfinite(list(losses.values())).all()
    assert all(torch.isfinite(weight).all() for weight in net.parameters())


def test_single_cells_have_nothing_but_themselves_to_learn():
    cells = Chunk(chunk(1).embeddings, np.zeros(1, np.int64), np.zeros(1, np.int64))
    with TrainingStep(model(1), CONFIG) as step:
        losses = step.update(cells, key())
    assert losses["triplet"] == losses["conservation"] == 0.0
    assert losses["total"] == losses["reconstruction"] > 0

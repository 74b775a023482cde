"""The conditional autoencoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.autoencoders import PLATFORMS, spread_model

from lloki_atlas.errors import InputError
from lloki_atlas.models.autoencoder import ConditionalAutoencoder

CELLS = np.random.default_rng(0).normal(size=(50, 512)).astype(np.float32)


def test_encoder_and_decoder_have_the_published_numbers_of_weights():
    model = ConditionalAutoencoder(PLATFORMS)
    sizes = [sum(weight.numel() for weight in part.parameters()) for part in (model.encoder, model.decoder)]
    assert sizes == [201_391, 170_671]


def test_a_platform_adds_twenty_numbers():
    counts = [sum(weight.numel() for weight in ConditionalAutoencoder(PLATFORMS[:n]).parameters()) for n in (1, 2, 3)]
    assert np.diff(counts).tolist() == [20, 20]


def test_forward_gives_128_latents_and_512_reconstructed_numbers():
    latents, reconstructed = ConditionalAutoencoder(PLATFORMS)(torch.zeros(4, 512), torch.tensor([0, 1, 2, 0]))
    assert latents.shape == (4, 128)
    assert reconstructed.shape == (4, 512)


def test_latents_are_not_negative_and_reconstructions_may_be():
    latents, reconstructed = spread_model()(torch.from_numpy(CELLS), torch.zeros(50, dtype=torch.int64))
    assert latents.min() == 0
    assert reconstructed.min() < 0


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_the_token_joins_the_input_of_the_first_layer(part: str):
    model = spread_model().double()
    width = {"encode": 512, "decode": 128}[part]
    layers, tokens = {
        "encode": (model.encoder, model.encoder_tokens),
        "decode": (model.decoder, model.decoder_tokens),
    }[part]
    platform = torch.tensor([2, 0, 1, 1])
    values = torch.rand(4, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([values, tokens.weight[platform]], dim=1)
    for position, layer in enumerate(layers):
        expected = expected @ layer.weight.T + layer.bias
        if part == "encode" or position < 2:
            expected = expected.clamp(min=0)
    torch.testing.assert_close(getattr(model, part)(values, platform), expected, rtol=0, atol=1e-12)


def test_the_two_token_tables_are_different():
    model = ConditionalAutoencoder(PLATFORMS)
    assert not torch.equal(model.encoder_tokens.weight, model.decoder_tokens.weight)


def test_equal_seeds_give_equal_weights_and_others_do_not():
    one, same, other = (ConditionalAutoencoder(PLATFORMS, random_state=seed) for seed in (1, 1, 2))
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])
    assert not torch.equal(one.encoder[0].weight, other.encoder[0].weight)


def test_making_a_model_leaves_the_global_random_state_alone():
    torch.manual_seed(4)
    before = torch.get_rng_state()
    ConditionalAutoencoder(PLATFORMS)
    assert torch.equal(before, torch.get_rng_state())


def test_weights_do_not_depend_on_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        model = ConditionalAutoencoder(PLATFORMS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("platforms", [[], ["a", "a"]])
def test_no_platform_or_a_repeated_one_is_refused(platforms: list[str]):
    with pytest.raises(InputError, match="platforms"):
        ConditionalAutoencoder(platforms)

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.textbook import splitmix

from lloki_atlas.kernels.hashing import absorb, mix, text_key, uniform

WORDS = st.integers(0, 2**64 - 1)


@settings(deadline=None, max_examples=25)
@given(a=WORDS, b=WORDS, c=WORDS)
def test_mix_equals_the_chain_in_python_integers(a, b, c):
    assert mix(a, b, c) == splitmix(a, b, c)


def test_first_word_gives_the_published_first_number_of_splitmix64():
    assert mix(0) == 0xE220A8397B1DCDAF


def test_a_negative_word_is_taken_modulo_two_to_the_64():
    assert mix(-1) == mix(2**64 - 1)


def test_mix_is_a_chain_of_absorb():
    assert mix(3, 5) == absorb(np.uint64(mix(3)), np.uint64(5))


def test_order_of_words_matters():
    assert mix(1, 2) != mix(2, 1)


def test_words_after_one_prefix_never_collide():
    state = np.uint64(mix(7))
    assert len({absorb(state, np.uint64(g)) for g in range(5000)}) == 5000


def test_uniform_lies_in_the_half_open_unit_interval_at_its_ends():
    assert uniform(np.uint64(0)) == 0.0
    assert 1 - 1e-15 < uniform(np.uint64(2**64 - 1)) < 1.0


def test_uniform_of_successive_counters_is_flat():
    values = np.array([uniform(np.uint64(mix(11, i))) for i in range(4000)])
    counts = np.histogram(values, bins=10, range=(0, 1))[0]
    # chi-square with 9 degrees of freedom is below 27.9 in 999 of 1000
    assert ((counts - 400) ** 2 / 400).sum() < 27.9


def test_text_key_is_the_head_of_sha256():
    assert text_key("slice-1") == int(hashlib.sha256(b"slice-1").hexdigest()[:16], 16)


@pytest.mark.parametrize("text", ["", "ä", "a" * 1000])
def test_text_key_fits_into_64_bits(text):
    assert 0 <= text_key(text) < 2**64

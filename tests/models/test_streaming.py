import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support.checkpoints import write_checkpoint

from lloki_atlas.config import EmbedderConfig
from lloki_atlas.errors import CheckpointError
from lloki_atlas.models.autoencoder import ConditionalAutoencoder
from lloki_atlas.models.embedders import ScGPTFactory
from lloki_atlas.models.encoder import FrozenEncoder

GENES = tuple(f"GENE{i}" for i in range(60))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), genes=GENES)
    return EmbedderConfig(name="scgpt", checkpoint=str(folder), device="cpu")


@pytest.fixture(scope="module")
def embedder(config):
    return ScGPTFactory().open(config, GENES, {}, {})


@pytest.fixture(scope="module")
def rows():
    rows = np.random.default_rng(0).poisson(1.0, size=(90, 60)).astype(np.float32)
    rows[7] = 0
    return rows


def test_prepare_and_finish_are_embed_from_any_thread(embedder, rows):
    with ThreadPoolExecutor(3) as pool:
        prepared = list(pool.map(embedder.prepare, np.array_split(rows, 5)))
    assert np.concatenate([embedder.finish(part) for part in prepared]).tobytes() == embedder.embed(rows).tobytes()


def test_rows_are_512_wide_and_a_cell_without_tokens_is_nan(embedder, rows):
    embedding = embedder.embed(rows)
    assert embedding.shape == (90, 512)
    assert np.isnan(embedding).all(axis=1).tolist() == [i == 7 for i in range(90)]
    assert not embedding[np.arange(90) != 7, 32:].any()


def test_the_encoder_behind_it_reads_what_is_stored(embedder, rows):
    encoder = FrozenEncoder(ConditionalAutoencoder(["A|x", "B|y"], random_state=1))
    embedding, latents = embedder.finish_encoded(embedder.prepare(rows), encoder, "B|y")
    assert embedding.tobytes() == embedder.embed(rows).tobytes()
    stored = embedding.astype(np.float16).astype(np.float32)
    assert latents.tobytes() == encoder.encode(stored, "B|y").tobytes()


def test_latents_made_on_a_device_agree_with_those_of_the_blocks(embedder, rows):
    encoder = FrozenEncoder(ConditionalAutoencoder(["A|x", "B|y"], random_state=1))
    embedding = embedder.embed(rows)
    latents = encoder.encode_tensor(torch.from_numpy(embedding), "B|y").numpy()
    np.testing.assert_allclose(latents, encoder.encode(embedding, "B|y"), atol=1e-5)


@pytest.mark.parametrize(
    "change", [{"precision": "bfloat16"}, {"mode": "reference"}, {"mode": "reference", "random_state": 1}]
)
def test_settings_that_decide_a_number_are_in_the_digest(config, change):
    assert digest_of(config, **change) != digest_of(config)


def test_each_seed_of_the_random_rule_has_a_digest(config):
    assert digest_of(config, mode="reference", random_state=1) != digest_of(config, mode="reference", random_state=2)


@pytest.mark.parametrize("change", [{"device": "auto"}, {"device_memory_mb": 900}, {"random_state": 5}])
def test_settings_that_decide_none_are_not(config, change):
    assert digest_of(config, **change) == digest_of(config)


def digest_of(config, **change):
    return ScGPTFactory().digest(EmbedderConfig(**{**vars(config), **change}))


@pytest.mark.parametrize(("device", "wanted"), [("auto", True), ("cuda", True), ("cpu", False)])
def test_a_gpu_is_wanted_unless_the_cpu_is_asked_for(config, device, wanted):
    assert ScGPTFactory().uses_device(EmbedderConfig(**{**vars(config), "device": device})) == wanted


PEAK = """
import re, sys
from pathlib import Path
from lloki_atlas.config import EmbedderConfig
from lloki_atlas.models.embedders import ScGPTFactory
from lloki_atlas.models import streaming

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

config = EmbedderConfig(name="scgpt", checkpoint=sys.argv[1], device="cpu")
before = status("VmRSS")
streaming.resident_model(config)
print(status("VmHWM") - before, ScGPTFactory().host_memory(config))
"""


def test_loading_keeps_to_the_memory_that_is_projected(tmp_path):
    folder = write_checkpoint(tmp_path, genes=[f"G{i}" for i in range(4000)], embsize=512, nheads=8, nlayers=6)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder)], check=True, capture_output=True, text=True, env={**os.environ}
    )
    measured, projected = map(int, done.stdout.split())
    size = (folder / "best_model.pt").stat().st_size
    assert size < measured <= projected <= 4 * size + 2**28


def test_a_plan_needs_no_checkpoint(tmp_path):
    gone = EmbedderConfig(name="scgpt", checkpoint=str(tmp_path / "gone"), device="cpu")
    assert ScGPTFactory().host_memory(gone) == 0


def test_a_model_wider_than_the_store_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path, genes=GENES[:3], embsize=516, nlayers=1)
    with pytest.raises(CheckpointError, match="516 dimensions"):
        ScGPTFactory().digest(EmbedderConfig(name="scgpt", checkpoint=str(folder), device="cpu"))

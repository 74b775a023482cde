"""Creating a catalog: what it holds, what it is keyed by, and that a refusal leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from support.atlases import CONFIG
from support.checkpoints import write_checkpoint

from lloki_atlas.config import AtlasConfig, EmbedderConfig, to_dict
from lloki_atlas.errors import CheckpointError, InputError
from lloki_atlas.models.embedders import embedder_factory
from lloki_atlas.stages.create import create_catalog, located, parse_embedder
from lloki_atlas.store.catalog import history, open_catalog, verify
from lloki_atlas.store.references import read_reference


@pytest.fixture
def created(tmp_path, profile):
    return create_catalog(tmp_path / "atlas", reference=profile, config=CONFIG)


def test_a_new_catalog_is_open_for_commits_at_its_first_version(created):
    assert (created.version, created.mode, created.state.slices) == (1, "r+", {})
    assert [record.message for record in history(created)] == ["create"]


def test_a_new_catalog_reads_back_with_its_settings(created):
    assert open_catalog(created.root).state.config == to_dict(CONFIG)


def test_a_new_catalog_holds_its_reference(created, profile):
    stored = read_reference(created.path("references", created.state.reference))
    assert (stored.symbols, stored.labels) == (profile.symbols, profile.labels)
    assert stored.factors.tobytes() == profile.factors.tobytes()


def test_a_new_catalog_says_which_embedder_it_has(created):
    path = created.path("models", created.state.models["embedder"]) / "embedder.json"
    digest = embedder_factory("reference").digest(CONFIG.embedder)
    assert json.loads(path.read_bytes()) == {"name": "reference", "digest": digest}


def test_a_new_catalog_is_whole_and_leaves_nothing_in_staging(created):
    assert verify(created) == []
    assert not list((created.root / "staging").glob("*"))


def test_a_reference_may_be_an_h5ad_file(tmp_path, sources, created):
    other = create_catalog(
        tmp_path / "other",
        reference=sources / "reference.h5ad",
        organism="mouse",
        label_key="cell_type_coarse",
        config=CONFIG,
    )
    assert other.state.reference == created.state.reference


@pytest.mark.parametrize(
    "change",
    [
        {"labels": lambda profile: ("x",) * len(profile.labels)},
        {"organism": lambda _: "human"},
        {"factors": lambda profile: profile.factors + np.float32(1)},
        {"totals": lambda profile: profile.totals + np.float32(1)},
    ],
    ids=["labels", "organism", "factors", "totals"],
)
def test_another_reference_has_another_key(tmp_path, profile, created, change):
    (name, value), *_ = change.items()
    other = create_catalog(
        tmp_path / "other", reference=dataclasses.replace(profile, **{name: value(profile)}), config=CONFIG
    )
    assert other.state.reference != created.state.reference


def test_the_number_of_factors_is_that_of_the_settings(tmp_path, sources):
    config = AtlasConfig(embedder=EmbedderConfig(n_factors=3))
    catalog = create_catalog(tmp_path / "atlas", reference=sources / "reference.h5ad", organism="mouse", config=config)
    assert read_reference(catalog.path("references", catalog.state.reference)).factors.shape[1] == 3


@pytest.mark.parametrize(
    ("text", "name", "checkpoint"),
    [
        ("reference", "reference", None),
        ("scgpt:models/human", "scgpt", "models/human"),
        ("scgpt:C:/models", "scgpt", "C:/models"),
        ("one-hot", "one-hot", None),
        ("one-hot:file", "one-hot", "file"),
    ],
)
def test_an_embedder_is_read_from_its_text(text, name, checkpoint):
    assert parse_embedder(text) == EmbedderConfig(name=name, checkpoint=checkpoint)


def test_an_embedder_named_in_text_keeps_the_other_settings():
    base = EmbedderConfig(ridge=7.0, checkpoint="here")
    assert parse_embedder("scgpt", base) == EmbedderConfig(name="scgpt", ridge=7.0, checkpoint="here")


def test_a_checkpoint_is_stored_with_its_absolute_path(tmp_path, profile, monkeypatch):
    write_checkpoint(tmp_path / "weights", genes=profile.symbols, embsize=8, nheads=2, d_hid=8, nlayers=1)
    monkeypatch.chdir(tmp_path)
    catalog = create_catalog("atlas", reference=profile, embedder="scgpt:weights", config=CONFIG)
    assert catalog.state.config["embedder"]["checkpoint"] == str(tmp_path / "weights")


def test_settings_without_a_checkpoint_stay_as_they_are():
    assert located(CONFIG) is CONFIG


def test_an_embedder_that_is_named_wins_over_the_settings(tmp_path, profile):
    config = dataclasses.replace(CONFIG, embedder=EmbedderConfig(name="nowhere", ridge=3.0))
    catalog = create_catalog(tmp_path / "atlas", reference=profile, embedder="reference", config=config)
    assert catalog.state.config["embedder"] == to_dict(EmbedderConfig(name="reference", ridge=3.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedder": "nowhere"}, "no embedder 'nowhere'"),
        ({"embedder": "scgpt"}, "needs a checkpoint folder"),
        ({"embedder": "scgpt:none"}, "no checkpoint folder"),
        ({"reference": "none.h5ad", "organism": "mouse"}, "none.h5ad"),
        ({"reference": "none.h5ad"}, "say the organism of the reference: organism='mouse' or 'human'"),
    ],
)
def test_a_refusal_leaves_nothing_behind(tmp_path, profile, options, message):
    with pytest.raises(InputError, match=message):
        create_catalog(tmp_path / "atlas", **{"reference": profile, "config": CONFIG, **options})
    assert not (tmp_path / "atlas").exists()


def drop_weight(folder):
    rewrite(folder, lambda state: state.pop("encoder.enc_norm.bias"))


def add_weight(folder):
    rewrite(folder, lambda state: state.update({"encoder.extra.weight": torch.zeros(3)}))


def reshape_weight(folder):
    rewrite(folder, lambda state: state.update({"value_encoder.linear1.bias": torch.zeros(5)}))


def rewrite(folder, edit):
    state = torch.load(folder / "best_model.pt", weights_only=True)
    edit(state)
    torch.save(state, folder / "best_model.pt")


def drop_cls(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    del vocabulary["<cls>"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))


def truncate(folder):
    data = (folder / "best_model.pt").read_bytes()
    (folder / "best_model.pt").write_bytes(data[: len(data) // 2])


class Code:
    """A pickle that would make a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def put_code(folder):
    torch.save({"encoder.enc_norm.bias": Code(folder / "ran")}, folder / "best_model.pt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_weight, r"lacks the parameter 'encoder\.enc_norm\.bias'"),
        (add_weight, r"has the parameter 'encoder\.extra\.weight'"),
        (reshape_weight, r"'value_encoder\.linear1\.bias'.*shape \(5,\)"),
        (drop_cls, r"vocab\.json has no '<cls>'"),
        (truncate, r"best_model\.pt as a file of weights"),
        (put_code, r"best_model\.pt as a file of weights"),
    ],
)
def test_a_wrong_checkpoint_is_named_and_leaves_nothing_behind(tmp_path, profile, damage, message):
    folder = write_checkpoint(tmp_path / "weights", genes=["ACTB"], nlayers=1)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        create_catalog(tmp_path / "atlas", reference=profile, config=CONFIG, embedder=f"scgpt:{folder}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights"]
    assert not (folder / "ran").exists()


def test_a_folder_that_holds_something_is_refused_and_kept(tmp_path, profile):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already and is not empty"):
        create_catalog(tmp_path, reference=profile)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_catalog_is_not_created_over_another(created, profile):
    with pytest.raises(InputError, match="open the catalog that is there"):
        create_catalog(created.root, reference=profile)


def test_an_empty_folder_is_taken(tmp_path, profile):
    assert create_catalog(tmp_path, reference=profile, config=CONFIG).version == 1


def test_a_creation_that_died_before_its_first_version_is_finished(created, profile):
    root = created.root
    (root / "versions" / "00000001.json").unlink()
    assert create_catalog(root, reference=profile, config=CONFIG).state.reference == created.state.reference

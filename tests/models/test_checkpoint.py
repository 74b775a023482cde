import json
import shutil

import pytest
import torch
from support.checkpoints import NAMINGS, write_checkpoint

from lloki_atlas.errors import CheckpointError, InputError
from lloki_atlas.models.checkpoint import read_checkpoint

GENES = tuple(f"GENE{i}" for i in range(70))
LAYER = "transformer_encoder.layers.1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), genes=GENES)


# refusals


@pytest.mark.parametrize("naming", sorted(NAMINGS))
def test_a_missing_attention_weight_is_refused_by_name(tmp_path, naming):
    def drop(state):
        del state[f"{LAYER}.self_attn.{NAMINGS[naming]}weight"]

    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.in_proj_weight.* of shape \(96, 32\)"):
        read_checkpoint(write_checkpoint(tmp_path, genes=GENES, naming=naming, edit=drop))


def test_every_missing_encoder_parameter_is_refused_by_name(tmp_path, folder):
    state = torch.load(folder / "best_model.pt", weights_only=True)
    needed = [n for n in state if n.startswith(("encoder.", "value_encoder.", "transformer_encoder."))]
    assert len(needed) == 9 + 2 * 12
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name in needed:
        torch.save({k: v for k, v in state.items() if k != name}, tmp_path / "best_model.pt")
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(tmp_path)
        assert f"'{name}'" in str(caught.value)


@pytest.mark.parametrize("name", [f"{LAYER}.linear2.weight", "encoder.enc_norm.bias", "value_encoder.linear1.weight"])
def test_a_wrong_shape_is_refused_with_both_shapes(tmp_path, name):
    def widen(state):
        state[name] = torch.zeros(7, 5)

    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(write_checkpoint(tmp_path, genes=GENES, edit=widen))
    assert f"'{name}'" in str(caught.value)
    assert "(7, 5)" in str(caught.value)
    assert "ask for (32" in str(caught.value)


@pytest.mark.parametrize("name", ["encoder.extra", "dsbn.weight", "transformer_encoder.layers.2.norm1.weight"])
def test_an_unknown_parameter_is_refused_by_name(tmp_path, name):
    def add(state):
        state[name] = torch.zeros(32)

    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(write_checkpoint(tmp_path, genes=GENES, edit=add))


def test_one_weight_under_two_names_is_refused(tmp_path):
    def add(state):
        state[f"{LAYER}.self_attn.Wqkv.bias"] = state[f"{LAYER}.self_attn.in_proj_bias"].clone()

    with pytest.raises(CheckpointError, match="one parameter"):
        read_checkpoint(write_checkpoint(tmp_path, genes=GENES, edit=add))


def test_a_weight_that_is_not_finite_is_refused(tmp_path):
    def damage(state):
        state[f"{LAYER}.norm2.bias"][3] = torch.nan

    with pytest.raises(CheckpointError, match=r"norm2\.bias.*not finite"):
        read_checkpoint(write_checkpoint(tmp_path, genes=GENES, edit=damage))


def test_a_vocabulary_of_another_size_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps({**vocabulary, "NEW": len(vocabulary)}))
    with pytest.raises(CheckpointError, match=r"encoder\.embedding\.weight.*\(73, 32\).*\(74, 32\)"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["embsize", "nheads", "d_hid", "nlayers", "pad_token", "pad_value"])
def test_a_missing_setting_is_refused_by_name(tmp_path, name):
    with pytest.raises(CheckpointError, match=f"no '{name}'"):
        read_checkpoint(write_checkpoint(tmp_path, genes=GENES, args={name: None}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embsize", "32"),
        ("nlayers", 2.0),
        ("nheads", True),
        ("nheads", 5),
        ("nlayers", 0),
        ("pad_value", "-2"),
        ("pad_token", 0),
        ("n_bins", 2),
        ("max_seq_len", 1),
        ("input_emb_style", "category"),
        ("pre_norm", True),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(tmp_path, name, value):
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(write_checkpoint(tmp_path, genes=GENES, args={name: value}))


def test_settings_that_are_no_table_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "args.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"args\.json"):
        read_checkpoint(tmp_path)


def test_a_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        read_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["args.json", "vocab.json", "best_model.pt"])
def test_a_missing_file_is_refused_by_name(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=name):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["args.json", "vocab.json", "best_model.pt"])
@pytest.mark.parametrize("kept", [0.0, 0.6])
def test_a_truncated_file_is_refused_by_name(folder, tmp_path, name, kept):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(tmp_path)


def test_a_pickled_object_is_refused_and_not_run(folder, tmp_path):
    class Runs:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    torch.save({"encoder.embedding.weight": Runs()}, tmp_path / "best_model.pt")
    with pytest.raises(CheckpointError, match="best_model"):
        read_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [torch.zeros(3), {"model": {"encoder.embedding.weight": torch.zeros(3)}}, [1, 2]])
def test_a_file_that_is_no_plain_table_of_weights_is_refused(folder, tmp_path, content):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    torch.save(content, tmp_path / "best_model.pt")
    with pytest.raises(CheckpointError, match="plain table"):
        read_checkpoint(tmp_path)


# digest


def test_the_digest_is_32_hexadecimal_characters_and_the_same_each_time(folder):
    digest = read_checkpoint(folder).digest
    assert len(digest) == 32
    assert int(digest, 16) >= 0
    assert read_checkpoint(folder).digest == digest


def test_the_digest_does_not_depend_on_where_the_folder_lies(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert read_checkpoint(tmp_path / "elsewhere").digest == read_checkpoint(folder).digest


def test_the_digest_changes_with_one_weight(tmp_path, folder):
    def nudge(state):
        state[f"{LAYER}.norm2.bias"][3] += 1e-6

    assert read_checkpoint(write_checkpoint(tmp_path, genes=GENES, edit=nudge)).digest != read_checkpoint(folder).digest


@pytest.mark.parametrize("name", ["args.json", "vocab.json"])
def test_the_digest_changes_with_a_description(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
    assert read_checkpoint(tmp_path).digest != read_checkpoint(folder).digest

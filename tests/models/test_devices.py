import pytest
import torch

from lloki_atlas.errors import InputError
from lloki_atlas.models.devices import torch_device


def test_auto_is_cuda_where_there_is_one(monkeypatch):
    for there, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert torch_device("auto").type == kind


@pytest.mark.parametrize("name", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_by_name(name):
    with pytest.raises(InputError, match=name):
        torch_device(name)

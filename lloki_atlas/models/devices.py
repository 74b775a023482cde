"""Which device torch computes on."""

from __future__ import annotations

import torch

from lloki_atlas.errors import InputError


def torch_device(name: str) -> torch.device:
    """Find a device by name; `auto` is CUDA where there is one.

    Raises
    ------
    InputError
        If torch cannot use it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise InputError(f"torch cannot use the device '{name}' here: say 'auto', 'cpu', or one that exists") from error
    return device

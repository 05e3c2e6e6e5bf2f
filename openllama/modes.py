"""What torch is doing around us: tracing, or computing in another type than its inputs have."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_traced(*tensors: Tensor) -> bool:
    """Whether operations are being recorded or transformed: compile, export, jit, fx, ``torch.func``."""
    if torch.compiler.is_compiling():
        return True
    if torch.jit.is_tracing() or is_in_torch_dispatch_mode() or is_transformed(*tensors):
        return True
    return any(isinstance(tensor, FakeTensor) for tensor in tensors)


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a function of ``torch.func`` (grad, vmap, jvp, ...) is at work on one of them."""
    if torch.compiler.is_compiling():
        return False
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)


def can_read_values(tensor: Tensor) -> bool:
    """Whether the numbers in ``tensor`` are there to be read."""
    return not (is_traced(tensor) or tensor.is_meta)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in on ``device``; None where it is off."""
    if not (torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)):
        return None
    return torch.get_autocast_dtype(device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which a linear layer computes with ``x``: its own, or autocast's, which leaves float64 alone."""
    return x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device) or x.dtype

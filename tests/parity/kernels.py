"""Which kernels a computation calls, and how their operands lie in memory.

How a matrix product rounds depends on the kernel that computes it, and the kernel is chosen by shapes, strides,
alignment and processor. If two computations call the same products with operands of the same layout, and are equal
otherwise, they give the same bits on every processor, whichever kernels it has. The same holds for sums and
activations, because their vectorised part rounds differently from the remainder.

Every other kernel rounds correctly in any layout, or only moves numbers, or depends on each number alone. Equal bits on
one processor show that both sides do the same there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "product": "mm bmm addmm baddbmm addbmm mv addmv dot vdot addr convolution",
    "rounded": (  # by the place of a number among others
        "sum nansum mean cumsum logsumexp linalg_vector_norm rsqrt pow exp log tanh tanh_backward "
        "sigmoid sigmoid_backward silu silu_backward gelu gelu_backward "
        "_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data "
        "native_layer_norm native_layer_norm_backward nll_loss_forward nll_loss_backward embedding_dense_backward"
    ),
    "frequency": "pow.Scalar",  # rounded as well, but HF computes it when a model is built
    "angle": "cos sin",  # by the number alone
    "exact": (
        "add sub rsub mul div reciprocal sqrt neg abs maximum minimum max min amax aminmax clamp relu "
        "nan_to_num threshold_backward eq ne lt le gt ge any all where masked_fill argmax topk sort "
        "multinomial isnan isinf normal uniform view _unsafe_view clone copy _to_copy lift_fresh cat stack "
        "repeat gather scatter scatter_add index index_select index_put embedding fill zero full_like "
        "ones_like zeros_like empty_like new_empty_strided new_full new_zeros new_ones new_empty "
        "slice_backward select_backward _local_scalar_dense"
    ),
}
KIND_OF = {kernel: kind for kind, kernels in KINDS.items() for kernel in kernels.split()}
_simple: set[Any] = set()  # the kernels that are found to consist of no others


class Operand(NamedTuple):
    """How a tensor lies in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # 0 along a dimension of one element, where a stride says nothing
    alignment: int  # address modulo 64, the width of the widest vectors
    lazy: tuple[bool, bool]  # conjugated, negated when read


class Call(NamedTuple):
    kernel: str
    operands: tuple[Operand, ...]


class Recorder(TorchDispatchMode):
    """Records the kernels called while it is entered, in order: ``products``, and others ``rounded`` by layout.

    ``frequencies`` are the powers behind the angles of rotary positions.
    A kernel on floating-point numbers that is in none of ``KINDS`` is a ``KeyError``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Call] = []
        self.rounded: list[Call] = []
        self.frequencies: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _simple:
            with self:  # `linear`, `matmul`, `einsum` and `rms_norm` arrive whole in inference mode
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            _simple.add(func)
        if not func.is_view:
            tensors = [value for value in _flat((*args, *kwargs.values())) if isinstance(value, Tensor)]
            if any(tensor.is_floating_point() for tensor in tensors):
                self._add(func, tensors)
        return func(*args, **kwargs)

    def _add(self, func: Any, tensors: list[Tensor]) -> None:
        calls = {"product": self.products, "rounded": self.rounded, "frequency": self.frequencies}.get(_kind(func))
        if calls is not None:
            calls.append(Call(func.overloadpacket.__name__, tuple(map(_operand, tensors))))


@cache
def _kind(func: Any) -> str:
    name = func.overloadpacket.__name__
    kind = KIND_OF.get(func.__name__) or KIND_OF.get(name) or KIND_OF.get(name.removesuffix("_"))  # in place
    if kind is None:
        raise KeyError(f"does {func.__name__} round by layout? Say so in KINDS")
    return kind


def record(function: Callable[[], Any]) -> Recorder:
    """What ``function`` calls."""
    with Recorder() as recorder:
        function()
    return recorder


def _operand(tensor: Tensor) -> Operand:
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    lazy = (tensor.is_conj(), tensor.is_neg())
    return Operand(tensor.dtype, tuple(tensor.shape), strides, tensor.data_ptr() % 64, lazy)


def _flat(arguments: Iterable[Any]) -> Iterable[Any]:
    for argument in arguments:
        if isinstance(argument, list | tuple):
            yield from _flat(argument)
        else:
            yield argument

"""Which kernels a computation calls, and how their operands lie in memory.

A matrix product is rounded as its kernel pleases, and the kernel is chosen by shapes, strides, alignment and
processor. Two computations that ask for the same products of operands that lie alike, and agree in all else, have the
same bits on every processor, whichever kernels it has. So do sums and activations, whose vectorised part and whose
remainder round differently.

All else is rounded correctly wherever it lies, or moves numbers, or depends on the number alone. Whether both sides do
the same there is seen from their equal bits on any one processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
        "threshold_backward eq ne lt le gt ge any all where masked_fill argmax topk sort multinomial isnan isinf "
        "view _unsafe_view clone copy _to_copy lift_fresh cat stack repeat gather scatter scatter_add index "
        "index_select index_put embedding fill zero full_like ones_like zeros_like empty_like new_empty_strided "
        "normal uniform new_full new_zeros new_ones new_empty slice_backward select_backward _local_scalar_dense"
    ),
}
KIND_OF = {kernel: kind for kind, kernels in KINDS.items() for kernel in kernels.split()}


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
        with self:  # `linear`, `matmul`, `einsum` and `rms_norm` arrive whole in inference mode
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        tensors = [value for value in _flat((*args, *kwargs.values())) if isinstance(value, Tensor)]
        if not func.is_view and any(tensor.is_floating_point() for tensor in tensors):
            self._add(func, tensors)
        return func(*args, **kwargs)

    def _add(self, func: Any, tensors: list[Tensor]) -> None:
        name = func.overloadpacket.__name__
        kind = KIND_OF.get(func.__name__) or KIND_OF.get(name) or KIND_OF.get(name.removesuffix("_"))  # in place
        if kind is None:
            raise KeyError(f"does {func.__name__} round by layout? Say so in KINDS")
        calls = {"product": self.products, "rounded": self.rounded, "frequency": self.frequencies}.get(kind)
        if calls is not None:
            calls.append(Call(name, tuple(map(_operand, tensors))))


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

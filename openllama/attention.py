"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), once as a specification, twice fused.

    softmax(Q K^T / sqrt(D) + mask) V

``eager`` is the specification, bitwise equal to transformers 4.31.0 on a CPU in float32. ``sdpa`` is
torch's fused kernel. ``xformers`` needs that library and CUDA, and is used only when asked for by name.
``register_backend`` adds a function of one's own.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import checkpoint

from openllama import masks
from openllama.errors import BackendError
from openllama.masks import Mask

BACKENDS = ("eager", "sdpa", "xformers")


def eager_attention(query: Tensor, key: Tensor, value: Tensor, mask: Mask, dropout: float) -> tuple[Tensor, Tensor]:
    """Query (B, H, T, D), key and value (B, H, S, D) -> output (B, H, T, D), weights (B, H, T, S).

    Exact with HF's CPU float32 only as written: scores divided after the product, ``maximum``
    rather than ``clamp`` (it splits the gradient of a tie), softmax in at least float32.
    """
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])  # (B, H, T, S)
    if mask.tensor is not None:
        scores = scores + mask.tensor
        scores = torch.maximum(scores, scores.new_full((), torch.finfo(scores.dtype).min))
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = F.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    return F.dropout(weights, dropout) @ value, weights


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, mask: Mask, dropout: float) -> tuple[Tensor, None]:
    """The same through torch's fused kernel, which never holds the weights."""
    if mask.real is not None:
        return _sdpa_in_blocks(query, key, value, mask.real, dropout), None
    sdpa = F.scaled_dot_product_attention
    attend = partial(sdpa, query, key, value, attn_mask=mask.tensor, dropout_p=dropout, is_causal=mask.causal)
    try:
        return attend(), None
    except NotImplementedError:  # the fused kernel has no forward-mode derivative
        with sdpa_kernel(SDPBackend.MATH):
            return attend(), None


def _sdpa_in_blocks(query: Tensor, key: Tensor, value: Tensor, real: Tensor, dropout: float) -> Tensor:
    """Blocks of queries, each with its mask and the keys up to its last query: memory is linear in the length.

    The backward pass computes each block again (not under ``torch.func``, which allows no such thing); else the masks
    of all blocks would be kept until then.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
        rows = query[:, :, start : start + masks.BLOCK]
        seen = key.shape[2] - query.shape[2] + start + rows.shape[2]  # number of keys
        mask = Mask(tensor=masks.causal_and_real(real[:, :seen], rows.shape[2]))
        return sdpa_attention(rows, key[:, :, :seen], value[:, :, :seen], mask, dropout)[0]

    trains = torch.is_grad_enabled() and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    run = partial(checkpoint, recomputed(attend, query), use_reentrant=False) if trains else attend
    return torch.cat([run(query, key, value, start) for start in range(0, query.shape[2], masks.BLOCK)], dim=2)


def recomputed(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """``function`` of x and others as it is to be given to ``checkpoint``.

    ``checkpoint`` calls it again in the backward pass, where a mode of torch may be off that is on now. A mode sees
    this call, as that of any function of torch, and may return a function that switches it on.
    """
    if has_torch_function((x,)):
        return handle_torch_function(recomputed, (x,), function, x)
    return function


def xformers_attention(query: Tensor, key: Tensor, value: Tensor, mask: Mask, dropout: float) -> tuple[Tensor, None]:
    """The same through xformers, which wants (B, T, H, D) and a mask of full size."""
    from xformers import ops

    batch, heads, length, _ = query.shape
    bias = ops.LowerTriangularMask() if mask.causal else mask.tensor
    if isinstance(bias, Tensor):
        bias = _aligned(bias.to(value.dtype)).expand(batch, heads, length, key.shape[2])
    output = ops.memory_efficient_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_bias=bias, p=dropout
    )
    return output.transpose(1, 2), None


def _aligned(bias: Tensor) -> Tensor:
    """The same bias in storage whose rows begin at multiples of 8 elements, as xformers' kernels want."""
    length = bias.shape[-1]
    return F.pad(bias, (0, -length % 8))[..., :length]


_FUNCTIONS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "eager": eager_attention,
    "sdpa": sdpa_attention,
    "xformers": xformers_attention,
}
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Mask, float, int], tuple[Tensor, Tensor | None]]
_REGISTERED: dict[str, Attend] = {}


def register_backend(name: str, function: Attend) -> None:
    """Make ``function`` a backend: ``attn_implementation=name`` then computes attention with it.

    ``function(query, key, value, mask, dropout, layer)`` gets query (B, H, T, D), key and value (B, H, S, D), the
    ``Mask`` as sdpa takes it (boolean, or additive if the caller's own 4-D mask is), the dropout probability (0
    outside of training) and the layer's number. It returns the output (B, H, T, D), and the weights (B, H, T, S) or
    None. A name may be registered again, as in a notebook; those of ``BACKENDS`` may not.
    """
    if name in BACKENDS or not callable(function):
        raise BackendError(f"register_backend needs a new name and a function, got {name!r} and {function!r}")
    _REGISTERED[name] = function


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, dropout: float, backend: str, layer: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Attend with one of ``BACKENDS``, of which eager alone returns weights, or with a registered one."""
    if backend in _REGISTERED:
        return _checked(_REGISTERED[backend](query, key, value, mask, dropout, layer), query, backend)
    return _FUNCTIONS[backend](query, key, value, mask, dropout)


def _checked(result: Any, query: Tensor, backend: str) -> tuple[Tensor, Tensor | None]:
    """What a registered function returned, if it is an output of the query's shape and weights or None."""
    if not (isinstance(result, tuple) and len(result) == 2 and getattr(result[0], "shape", None) == query.shape):
        found = tuple(getattr(part, "shape", part) for part in result) if isinstance(result, tuple) else type(result)
        raise BackendError(
            f"backend {backend!r} must return a pair: an output {tuple(query.shape)}, as the query (B, H, T, D), and "
            f"weights or None; got {found}"
        )
    return result


def backend_with_weights(name: str) -> str:
    """The backend that computes a pass which returns attention weights: eager in place of a fused one."""
    return name if name in _REGISTERED else "eager"


def check_backend(name: str, device: torch.device) -> str:
    """``name`` if that backend can run on ``device``, else a ``BackendError`` that says why."""
    if name not in BACKENDS and name not in _REGISTERED:
        known = ", ".join((*BACKENDS, *_REGISTERED))
        raise BackendError(f"attn_implementation {name!r} is unknown; choose one of {known}, or register_backend")
    if name == "xformers":
        if importlib.util.find_spec("xformers") is None:
            raise BackendError("attn_implementation 'xformers' needs that library: pip install 'openllama[xformers]'")
        if device.type not in ("cuda", "meta"):
            raise BackendError(f"attn_implementation 'xformers' runs on CUDA, the model is on {device}; use 'sdpa'")
    return name

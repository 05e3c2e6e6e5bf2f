"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), once as a specification, twice fused.

    softmax(Q K^T / sqrt(D) + mask) V

``eager`` is the specification, bitwise equal to transformers 4.31.0 on a CPU in float32. ``sdpa`` is
torch's fused kernel. ``xformers`` needs that library and CUDA, and is used only when asked for by name.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask.tensor, dropout_p=dropout, is_causal=mask.causal
    )
    return output, None


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


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, dropout: float, backend: str
) -> tuple[Tensor, Tensor | None]:
    """Attend with one of ``BACKENDS``; the weights come back from eager alone."""
    return _FUNCTIONS[backend](query, key, value, mask, dropout)


def check_backend(name: str, device: torch.device) -> str:
    """``name`` if that backend can run on ``device``, else a ``BackendError`` that says why."""
    if name not in BACKENDS:
        raise BackendError(f"attn_implementation {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if name == "xformers":
        if importlib.util.find_spec("xformers") is None:
            raise BackendError("attn_implementation 'xformers' needs that library: pip install 'openllama[xformers]'")
        if device.type not in ("cuda", "meta"):
            raise BackendError(f"attn_implementation 'xformers' runs on CUDA, the model is on {device}; use 'sdpa'")
    return name

"""Which keys a query may see: nothing later than itself, and no padding.

A prompt of two tokens, left-padded to three, attention_mask = [0, 1, 1]; rows are queries:

    causal  1 0 0     padding  0 1 1     both  0 0 0   <- the padding row sees nothing at all
            1 1 0              0 1 1           0 1 0
            1 1 1              0 1 1           0 1 1

With S - T keys cached, the last query still sees every key: the causal triangle sits lower right.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openllama.errors import InputError

BLOCK = 512  # queries; sdpa builds the mask of a longer pass in blocks of so many


class Mask(NamedTuple):
    """The mask of one forward pass, shared by its layers.

    ``causal``: the plain T x T triangle is all there is, so that no tensor is needed.
    ``tensor``: (B | 1, H | 1, T, S), boolean (True: the query sees the key) or additive; None: no tensor.
    ``real``: (B | 1, S), True for keys that are not padding, in place of a tensor where that would be large: sdpa
    builds the mask a few queries at a time. The backends that are registered always get the tensor.
    """

    causal: bool = False
    tensor: Tensor | None = None
    real: Tensor | None = None


def causal_mask(length: int, key_length: int, device: torch.device) -> Tensor:
    """Boolean (T, S): True where key s is not later than query t."""
    return torch.ones(length, key_length, dtype=torch.bool, device=device).tril(key_length - length)


def prepare_mask(attention_mask: Tensor | None, length: int, key_length: int, hidden: Tensor, backend: str) -> Mask:
    """The mask in the form that ``backend`` takes, built once per forward pass.

    ``attention_mask``: (B, S) of 0 (padding) and 1, or 4-D, boolean or additive, which carries causality itself.
    """
    if backend == "eager":
        return additive_mask(attention_mask, length, key_length, hidden)
    if backend == "sdpa" and length > BLOCK and not torch.compiler.is_compiling():
        if attention_mask is None and length < key_length:
            return Mask(real=torch.ones(1, key_length, dtype=torch.bool, device=hidden.device))
        if attention_mask is not None and attention_mask.ndim == 2:
            return Mask(real=attention_mask.to(hidden.device) == 1)
    mask = boolean_mask(attention_mask, length, key_length, hidden)
    if backend == "xformers" and mask.tensor is not None:
        return additive_mask(mask.tensor, length, key_length, hidden)
    return mask


def additive_mask(attention_mask: Tensor | None, length: int, key_length: int, hidden: Tensor) -> Mask:
    """The sum of a causal and a padding term, each 0 or the lowest finite number of ``hidden``'s dtype.

    Where both forbid a key the float32 sum is -inf; attention raises it to the lowest finite number
    again, so that a row that sees no key attends to all keys alike. This is HF's arithmetic.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        if attention_mask.dtype == torch.bool:
            return Mask(tensor=_lowest_where(~attention_mask, hidden.dtype))
        return Mask(tensor=attention_mask.to(hidden.device, hidden.dtype))
    bias = None
    if length > 1:
        bias = _lowest_where(~causal_mask(length, key_length, hidden.device), hidden.dtype)[None, None]
    if attention_mask is not None:
        padding = _lowest_where(attention_mask.to(hidden.device) == 0, hidden.dtype)[:, None, None, :]
        bias = padding if bias is None else padding + bias
    return Mask(tensor=bias)


def boolean_mask(attention_mask: Tensor | None, length: int, key_length: int, hidden: Tensor) -> Mask:
    """The same rule for fused kernels: a flag where the plain triangle is all there is, else a boolean tensor."""
    if attention_mask is None:
        if length == 1:
            return Mask()
        if length == key_length:
            return Mask(causal=True)
        return Mask(tensor=causal_mask(length, key_length, hidden.device)[None, None])
    if attention_mask.ndim == 4 and attention_mask.dtype != torch.bool:
        return Mask(tensor=attention_mask.to(hidden.device, hidden.dtype).clamp(min=torch.finfo(hidden.dtype).min))
    seen = attention_mask.to(hidden.device)
    return Mask(tensor=causal_and_real(seen == 1, length) if attention_mask.ndim == 2 else _never_empty(seen))


def causal_and_real(real: Tensor, length: int) -> Tensor:
    """Boolean (B, 1, T, S) for the last ``length`` of S positions, of which ``real`` (B, S) are not padding."""
    return _never_empty(causal_mask(length, real.shape[1], real.device) & real[:, None, None])


def _never_empty(seen: Tensor) -> Tensor:
    """A row that sees no key would be NaN in a softmax; it sees every key instead: finite, and used by nobody."""
    return seen | ~seen.any(-1, keepdim=True)


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only: mask [0, 0, 1, 1] -> [1, 1, 0, 1]; padding is at 1, as in HF."""
    return (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)


def pack_documents(lengths: Sequence[int], device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Mask and positions for documents laid end to end in one row, none of which sees another.

    Lengths [2, 1] -> attention_mask (1, 1, 3, 3), bool, and position_ids (1, 3):

        1 0 0     0 1 0
        1 1 0
        0 0 1

    A document of length n gets the numbers it would get alone (under dynamic RoPE scaling only while all
    of them fit ``max_position_embeddings``: the base follows the whole length). Raises ``InputError``.
    """
    try:
        lengths = [operator.index(length) for length in lengths]
    except TypeError as error:
        raise InputError(f"document lengths must be integers, got {lengths}") from error
    if not lengths or min(lengths) < 1:
        raise InputError(f"document lengths must be positive, got {lengths}")
    counts = torch.tensor(lengths, device=device)
    document = torch.arange(len(lengths), device=device).repeat_interleave(counts)  # of each token
    start = (counts.cumsum(0) - counts).repeat_interleave(counts)
    total = len(document)
    mask = causal_mask(total, total, document.device) & (document[:, None] == document)
    return mask[None, None], (torch.arange(total, device=device) - start)[None]


def _lowest_where(masked: Tensor, dtype: torch.dtype) -> Tensor:
    zeros = torch.zeros(masked.shape, dtype=dtype, device=masked.device)
    return zeros.masked_fill(masked, torch.finfo(dtype).min)

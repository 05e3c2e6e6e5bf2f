"""Rotary position embedding (Su et al. 2021, section 3.4.2), in the half-split layout of LLaMA weights.

Feature d of a head is paired with feature d + D/2, and the pair is turned by position * frequency[d]:

    (x1, x2)  ->  (x1 cos - x2 sin,  x2 cos + x1 sin)  =  (x1, x2) (cos, cos) + (x2, x1) (-sin, sin)

Pure functions, no tables: the angles of a call depend on that call alone.
Shapes here and everywhere: B batch, T query length, S key length, H heads, D head dim, C hidden size,
V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BASE = 10000.0


def frequencies(
    head_dim: int,
    scaling: dict[str, Any] | None,
    max_positions: int,
    key_length: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """Angle per position of each feature pair, shape (D/2,).

    Dynamic NTK scaling (reddit users bloc97 and emozilla) raises the base once ``key_length`` exceeds
    the trained ``max_positions``, which slows the low frequencies and leaves the high ones alone.
    """
    base = BASE
    if scaling is not None and scaling["type"] == "dynamic" and key_length > max_positions:
        factor = scaling["factor"]
        stretch = factor * key_length / max_positions - (factor - 1)
        base = BASE * stretch ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim
    return (base**exponents).reciprocal()


def cos_sin(
    position_ids: Tensor,
    head_dim: int,
    scaling: dict[str, Any] | None,
    max_positions: int,
    key_length: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine for ``rotate``: position_ids (B, T) -> two of (B, T, 1, D).

    Both halves of D hold the same angles; the sine is negative in the first. Returned in ``dtype``, but computed at
    least in float32: bfloat16 cannot tell position 2047 from 2048. Linear scaling (reddit user kaiokendev) divides
    the positions by its factor.
    """
    wide = torch.promote_types(dtype, torch.float32)
    positions = position_ids.to(wide)
    if scaling is not None and scaling["type"] == "linear":
        positions = positions / scaling["factor"]
    turn = frequencies(head_dim, scaling, max_positions, key_length, wide, position_ids.device)
    angles = positions[:, :, None, None] * turn  # (B, T, 1, D/2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each feature pair of x (B, T, H, D) by its position's angle, as ``cos_sin`` gives it."""
    turned = x * cos  # first: the strides of x's gradient follow the order, and are HF's this way
    half = x.shape[-1] // 2
    return turned + torch.cat((x[..., half:], x[..., :half]), dim=-1) * sin

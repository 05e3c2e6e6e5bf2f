"""Training losses, always computed in at least float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, T, V) at t against labels (B, T) at t + 1; -100 is ignored."""
    predictions = logits[:, :-1].flatten(0, 1)
    predictions = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    targets = labels[:, 1:].flatten().to(logits.device, torch.long)
    return F.cross_entropy(predictions, targets)

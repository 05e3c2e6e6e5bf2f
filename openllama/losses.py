"""Training losses, always computed in at least float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**24  # logits held at a time by chunked_causal_lm_loss: 64 MiB in float32


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, T, V) at t against labels (B, T) at t + 1; -100 is ignored."""
    return F.cross_entropy(_wide(logits[:, :-1].flatten(0, 1)), _targets(labels, logits.device))


def chunked_causal_lm_loss(
    hidden: Tensor, labels: Tensor, project: Callable[[Tensor], Tensor], vocab_size: int
) -> Tensor:
    """The same from hidden states (B, T, C), with a few rows of logits at a time.

    ``project`` makes logits of hidden states. The backward pass computes each chunk's logits again
    instead of keeping them, which trades a little time for B * T * V numbers of memory.
    """
    rows = hidden[:, :-1].flatten(0, 1)  # (B * (T - 1), C)
    targets = _targets(labels, hidden.device)

    def loss_of(rows: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(_wide(project(rows)), targets, reduction="sum")

    size = max(1, CHUNK_LOGITS // vocab_size)
    pairs = zip(rows.split(size), targets.split(size), strict=True)
    losses = [checkpoint(loss_of, *pair, use_reentrant=False) for pair in pairs]
    return torch.stack(losses).sum() / (targets != -100).sum()


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """Loss of pooled logits (B, num_labels): squared error, cross-entropy, or one binary choice per label."""
    logits, labels = _wide(logits), labels.to(logits.device)
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels.flatten().long())
    labels = labels.reshape(logits.shape).to(logits.dtype)
    if problem_type == "regression":
        return F.mse_loss(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _targets(labels: Tensor, device: torch.device) -> Tensor:
    return labels[:, 1:].flatten().to(device, torch.long)

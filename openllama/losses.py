"""Training losses, always computed in at least float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openllama.errors import InputError

CHUNK_LOGITS = 2**22  # logits held at a time where all are not needed: 16 MiB in float32


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, T, V) at t against labels (B, T) at t + 1; -100 is ignored."""
    return F.cross_entropy(_wide(logits[:, :-1].flatten(0, 1)), _targets(labels, logits.device))


def chunked_causal_lm_loss(hidden: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """The same from hidden states (B, T, C) and the head's weight (V, C), a few columns of logits at a time.

    ``torch.func`` gets all logits at once; one differentiated twice raises ``InputError``.
    """
    if _is_transformed(hidden) or _is_transformed(weight):
        return causal_lm_loss(F.linear(hidden, weight), labels)
    rows = hidden[:, :-1].flatten(0, 1)  # (B * (T - 1), C)
    dtype = F.linear(rows[:0], weight[:1]).dtype  # autocast's, where that is on: it does not reach the backward pass
    return _LinearCrossEntropy.apply(rows.to(dtype), weight.to(dtype), _targets(labels, hidden.device))


def _is_transformed(tensor: Tensor) -> bool:
    """Whether ``torch.func`` (grad, vmap, jvp) is at work on ``tensor``: what it wraps has no memory of its own."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, nn.Parameter):
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:
        return True
    return False


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of rows (N, C) @ weight (V, C).T with targets (N,), a few columns at a time.

    Forward adds up log-sum-exp over the columns. Backward computes the logits again: their slope is
    softmax minus one at the target. Cut along the vocabulary, each piece of the weight's gradient is
    made once, in place.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        size = max(1, CHUNK_LOGITS // max(1, len(rows)))
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = torch.full((len(rows),), -torch.inf, dtype=wide, device=rows.device)  # log of the sum of exp
        chosen = torch.zeros_like(total)
        for start in range(0, len(weight), size):
            logits = _wide(F.linear(rows, weight[start : start + size]))
            total = torch.logaddexp(total, logits.logsumexp(1))
            column, inside = _columns(targets, start, logits)
            chosen += logits.gather(1, column)[:, 0] * inside
        ctx.save_for_backward(rows, weight, targets, total)
        ctx.size = size
        real = targets != -100
        return torch.where(real, total - chosen, 0).sum() / real.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if torch.is_grad_enabled():
            raise InputError("model.loss has no second derivative; use model(input_ids, labels=labels).loss")
        rows, weight, targets, total = ctx.saved_tensors
        real = targets != -100
        scale = torch.where(real, grad / real.sum(), 0)[:, None]  # no target at all: no slope, as everywhere
        to_rows = torch.zeros_like(rows, dtype=total.dtype)
        to_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(weight), ctx.size):
            piece = weight[start : start + ctx.size]
            logits = _wide(F.linear(rows, piece)).sub_(total[:, None]).exp_()  # probabilities
            column, inside = _columns(targets, start, logits)
            logits.scatter_add_(1, column, -inside[:, None].to(logits.dtype))
            slope = logits.mul_(scale).to(rows.dtype)
            if to_weight is not None:
                to_weight[start : start + ctx.size] = slope.T @ rows
            to_rows += slope @ piece
        return to_rows.to(rows.dtype), to_weight, None


def _columns(targets: Tensor, start: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Where each target stands in the columns from ``start`` on (N, 1), and whether it does (N,)."""
    column = targets - start
    inside = (column >= 0) & (column < logits.shape[1])
    return column.clamp(0, logits.shape[1] - 1)[:, None], inside


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

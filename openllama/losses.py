"""Training losses, always computed in at least float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openllama.checks import is_transformed
from openllama.errors import InputError
from openllama.products import linear, matmul

CHUNK_LOGITS = 2**22  # logits that the chunked loss works on at a time: 16 MiB in float32
KEPT_LOGITS = 2**25  # logits that it keeps from forward for backward: 64 MiB in half precision


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, T, V) at t against labels (B, T) at t + 1; -100 is ignored."""
    return F.cross_entropy(_upcast(logits[:, :-1].contiguous().flatten(0, 1)), _targets(labels, logits.device))


def chunked_causal_lm_loss(hidden: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """The same loss from hidden states (B, T, C) and the head's weight (V, C), a few columns of logits at a time.

    Under ``torch.func`` all logits are computed at once. A second derivative raises ``InputError``.
    """
    if is_transformed(hidden) or is_transformed(weight):
        return causal_lm_loss(F.linear(hidden, weight), labels)
    rows = hidden[:, :-1].flatten(0, 1)  # (B * (T - 1), C)
    dtype = F.linear(rows[:0], weight[:1]).dtype  # autocast's if it is on; autocast does not affect backward
    return _LinearCrossEntropy.apply(rows.to(dtype), weight.to(dtype), _targets(labels, hidden.device))


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of rows (N, C) @ weight (V, C).T with targets (N,), a few columns at a time.

    Forward accumulates log-sum-exp over the columns. Backward needs the logits again: their gradient is the softmax,
    minus one at the target. The first ``KEPT_LOGITS`` are kept, in the type of ``rows``; the others are computed a
    second time. Chunks are along the vocabulary, so each part of the weight's gradient is computed once, in place.
    Where bfloat16 is slow on a CPU, its products are computed in float32 and rounded (``products``).
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        size = max(1, CHUNK_LOGITS // max(1, len(rows)))
        dtype = torch.promote_types(rows.dtype, torch.float32)
        logsumexp = torch.full((len(rows),), -torch.inf, dtype=dtype, device=rows.device)
        target_logits = torch.zeros_like(logsumexp)
        kept: list[Tensor] = []
        for start in range(0, len(weight), size):
            logits = linear(rows, weight[start : start + size])
            if start * len(rows) + logits.numel() <= KEPT_LOGITS:
                kept.append(logits)
            logits = _upcast(logits)
            logsumexp = torch.logaddexp(logsumexp, logits.logsumexp(1))
            column, inside = _columns(targets, start, logits)
            target_logits += logits.gather(1, column)[:, 0] * inside
        ctx.save_for_backward(rows, weight, targets, logsumexp, *kept)
        ctx.size = size
        valid = targets != -100
        return torch.where(valid, logsumexp - target_logits, 0).sum() / valid.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if torch.is_grad_enabled():
            raise InputError("model.loss has no second derivative; use model(input_ids, labels=labels).loss")
        rows, weight, targets, logsumexp, *kept = ctx.saved_tensors
        valid = targets != -100
        scale = torch.where(valid, grad / valid.sum(), 0)[:, None]  # without any target: zeros, as F.cross_entropy
        grad_rows = torch.zeros_like(rows, dtype=logsumexp.dtype)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for number, start in enumerate(range(0, len(weight), ctx.size)):
            chunk = weight[start : start + ctx.size]
            logits = kept[number] if number < len(kept) else linear(rows, chunk)
            wide = (logits - logsumexp[:, None]).exp_()  # probabilities
            column, inside = _columns(targets, start, wide)
            wide.scatter_add_(1, column, -inside[:, None].to(wide.dtype))
            grad_logits = wide.mul_(scale).to(rows.dtype)
            if grad_weight is not None:
                matmul(grad_logits.T, rows, out=grad_weight[start : start + ctx.size])
            grad_rows += matmul(grad_logits, chunk)
        return grad_rows.to(rows.dtype), grad_weight, None


def _columns(targets: Tensor, start: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Index of each target among the columns from ``start`` on (N, 1), and whether it is among them (N,)."""
    column = targets - start
    inside = (column >= 0) & (column < logits.shape[1])
    return column.clamp(0, logits.shape[1] - 1)[:, None], inside


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """Loss of pooled logits (B, num_labels): mean squared error, cross-entropy, or binary cross-entropy."""
    logits, labels = _upcast(logits), labels.to(logits.device)
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels.flatten().long())
    labels = labels.reshape(logits.shape).to(logits.dtype)
    if problem_type == "regression":
        return F.mse_loss(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _targets(labels: Tensor, device: torch.device) -> Tensor:
    return labels[:, 1:].contiguous().flatten().to(device, torch.long)

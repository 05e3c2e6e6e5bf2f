"""When to stop, besides eos and length: functions of (input_ids (B, L), scores (B, V)), asked after each token.

They return one bool for all sequences, as in transformers, or a bool tensor (B,), one per sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from openllama.errors import InputError

StoppingCriterion: TypeAlias = Callable[[Tensor, Tensor], "bool | Tensor"]


def max_time(seconds: float) -> StoppingCriterion:
    """Stop all sequences once ``seconds`` have passed; the clock starts now."""
    start = time.monotonic()
    return lambda input_ids, scores: time.monotonic() - start > seconds


def stopped(criteria: Iterable[StoppingCriterion], input_ids: Tensor, scores: Tensor) -> Tensor:
    """Which sequences any of the criteria ends, (B,)."""
    result = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for criterion in criteria:
        answer = criterion(input_ids, scores)
        if answer is None or isinstance(answer, str):
            raise InputError(f"a stopping criterion returns a bool or a bool tensor (batch,), got {answer!r}")
        result |= answer.to(result.device, torch.bool) if isinstance(answer, Tensor) else bool(answer)
    return result

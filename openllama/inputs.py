"""What a forward pass may be given. Values are looked at here and nowhere else.

Looking at values costs a synchronisation on a GPU and is impossible while torch traces and on the meta
device, so these checks step aside there; shapes are always checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openllama.config import OpenLlamaConfig
from openllama.errors import InputError
from openllama.modes import can_read_values


def is_integer(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # torch can do little else


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a tensor, got {type(value).__name__}; use torch.tensor(...)")


def check_input_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Token ids: integers of shape (B, T) inside the vocabulary, at least one."""
    check_tensor("input_ids", input_ids)
    if not is_integer(input_ids):
        raise InputError(f"input_ids must be integers, got {input_ids.dtype}")
    if input_ids.ndim != 2:
        raise InputError(f"input_ids must have shape (batch, length), got {tuple(input_ids.shape)}")
    if input_ids.numel() == 0:
        raise InputError(f"input_ids is empty, shape {tuple(input_ids.shape)}; give at least one token")
    if can_read_values(input_ids):
        low, high = (int(value) for value in input_ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise InputError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")


def check_inputs_embeds(inputs_embeds: Tensor, hidden_size: int) -> None:
    """Embedded input: floating point, shape (B, T, C), at least one token."""
    check_tensor("inputs_embeds", inputs_embeds)
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != hidden_size:
        raise InputError(f"inputs_embeds must be (batch, length, {hidden_size}), got {tuple(inputs_embeds.shape)}")
    if inputs_embeds.numel() == 0:
        raise InputError(f"inputs_embeds is empty, shape {tuple(inputs_embeds.shape)}; give at least one token")
    if not inputs_embeds.is_floating_point():
        raise InputError(f"inputs_embeds must be floating point, got {inputs_embeds.dtype}")


def check_position_ids(position_ids: Tensor, batch: int, length: int) -> None:
    """Positions: non-negative integers, (B, T), (1, T) or (T,)."""
    check_tensor("position_ids", position_ids)
    if not is_integer(position_ids):
        raise InputError(f"position_ids must be integers, got {position_ids.dtype}")
    if position_ids.shape not in ((length,), (1, length), (batch, length)):
        raise InputError(f"position_ids must be ({batch}, {length}), got {tuple(position_ids.shape)}")
    if can_read_values(position_ids) and (low := int(position_ids.min())) < 0:
        raise InputError(f"position_ids must not be negative, got {low}")


def check_attention_mask(mask: Tensor, batch: int, length: int, key_length: int, heads: int = 1) -> None:
    """A padding mask of 0/1 or bool, (B, S), or a full mask (B | 1, H | 1, T, S), bool or additive."""
    check_tensor("attention_mask", mask)
    cached = key_length - length
    if mask.ndim == 4:
        fits = mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads) and mask.shape[2:] == (length, key_length)
        if not fits:
            raise InputError(
                f"a 4-D attention_mask must be ({batch}, 1, {length}, {key_length}), got {tuple(mask.shape)}"
            )
        if not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise InputError(f"a 4-D attention_mask must be bool or additive floating point, got {mask.dtype}")
        return
    if mask.ndim != 2 or mask.shape[0] != batch:
        raise InputError(f"attention_mask must be ({batch}, {key_length}), got {tuple(mask.shape)}")
    if mask.shape[1] != key_length:
        raise InputError(
            f"attention_mask covers {mask.shape[1]} tokens, but there are {key_length}: "
            f"{cached} cached and {length} new; it must cover them all"
        )
    if mask.dtype != torch.bool and can_read_values(mask) and (wrong := mask[(mask != 0) & (mask != 1)]).numel():
        raise InputError(
            f"a 2-D attention_mask holds only 1 (attend) and 0 (padding), got {wrong[0].item()}; "
            "use a 4-D mask for additive values"
        )


def check_labels(labels: Tensor, shape: torch.Size, vocab_size: int) -> None:
    """Language-model labels: integers of the shape of the input; -100 is ignored."""
    check_tensor("labels", labels)
    if labels.shape != shape:
        raise InputError(f"labels must have the input's shape {tuple(shape)}, got {tuple(labels.shape)}")
    if not is_integer(labels):
        raise InputError(f"labels must be integers, got {labels.dtype}")
    _check_label_range(labels, vocab_size, f"the vocabulary of {vocab_size}")


def check_classification_labels(labels: Tensor, batch: int, config: OpenLlamaConfig) -> str:
    """The kind of problem that ``labels`` pose, after checking that they fit it.

    Where the config leaves ``problem_type`` open, one label means regression, integers mean a class
    per row (B,), and anything else a binary choice per label (B, num_labels), as in transformers.
    """
    check_tensor("labels", labels)
    count, kind = config.num_labels, config.problem_type
    if kind is None:
        kind = "single_label_classification" if is_integer(labels) else "multi_label_classification"
        kind = "regression" if count == 1 else kind
    per_row = kind == "single_label_classification" or count == 1
    shapes = [(batch,), (batch, 1)] if per_row else [(batch, count)]
    if tuple(labels.shape) not in shapes:
        raise InputError(f"labels for {kind} must have shape {shapes[0]}, got {tuple(labels.shape)}")
    if kind == "single_label_classification":
        if not is_integer(labels):
            raise InputError(f"labels for {kind} must be integers, got {labels.dtype}")
        _check_label_range(labels, count, f"the {count} classes of num_labels")
    return kind


def _check_label_range(labels: Tensor, count: int, what: str) -> None:
    if can_read_values(labels):
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= count))]
        if wrong.numel():
            raise InputError(f"label {int(wrong[0])} is outside {what} (-100 is ignored)")

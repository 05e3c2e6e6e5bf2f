"""Batches of id sequences: truncation, padding, masks and tensors.

    ids of two strings          [[5, 6, 7, 8], [9]]
    max_length=3, with eos = 2  [[5, 6, 2], [9, 2]]       eos counts: at most 2 other ids are kept
    padding=True, with pad = 3  [[5, 6, 2], [9, 2, 3]]
    attention_mask              [[1, 1, 1], [1, 1, 0]]

These functions do not need the tokenizer: its settings are their arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from openllama.errors import TokenizerError
from openllama.tokenizer.checks import one_of

NO_MAX_LENGTH = int(1e30)  # HF's files store this for "no limit"
HIGHEST_LENGTH = 1e20  # a larger number means "no limit", too


class Encoding(dict[str, Any]):
    """A dict of ``input_ids`` and ``attention_mask``. Keys are also attributes; ``to`` moves the tensors."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"this encoding holds {', '.join(self)}; it has no {name}")
        return self[name]

    def to(self, device: str | int | torch.device) -> Encoding:
        """Move every tensor to ``device``, in place; returns self."""
        if not all(isinstance(value, torch.Tensor) for value in self.values()):
            raise TokenizerError('only tensors can be moved to a device; encode with return_tensors="pt"')
        self.update({name: value.to(device) for name, value in self.items()})
        return self


def room_for_text(
    truncation: bool | str | None, max_length: int | None, model_max_length: int, padding: bool | str, special: int
) -> int | None:
    """Number of ids that one string may keep, without its ``special`` bos and eos; None: no limit."""
    one_of("truncation", truncation, (True, False, None, "longest_first", "only_first", "do_not_truncate"))
    if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
        raise TokenizerError(f"max_length must be a positive integer, got {max_length!r}")
    if truncation is None:
        truncation = max_length is not None and padding is False
    limit = max_length or model_max_length
    if truncation in (False, "do_not_truncate") or limit > HIGHEST_LENGTH:
        return None
    if limit < special:
        raise TokenizerError(f"max_length {limit} leaves no room for the {special} special tokens of each string")
    return limit - special


def cut(ids: list[int], room: int | None, side: str) -> list[int]:
    """Keep at most ``room`` ids; the others are removed on ``side``."""
    if room is None or len(ids) <= room:
        return ids
    return ids[:room] if side == "right" else ids[len(ids) - room :]


def padded(batch: Mapping[str, Any], padding: bool | str, max_length: int, pad_id: int | None, side: str) -> Encoding:
    """Add a mask and pad the rows on ``side``, to ``max_length`` or to the longest row."""
    rows = batch["input_ids"]
    masks = batch.get("attention_mask") or [[1] * len(row) for row in rows]
    length = 0
    if one_of("padding", padding, (True, "longest", "max_length", False, "do_not_pad")) not in (False, "do_not_pad"):
        if pad_id is None:
            raise TokenizerError("padding needs a pad token; tokenizer.pad_token = tokenizer.eos_token gives one")
        length = max_length if padding == "max_length" else max(map(len, rows))
    if length > HIGHEST_LENGTH:
        raise TokenizerError("padding='max_length' needs max_length; the tokenizer has no model_max_length")
    filled = Encoding(batch)
    for name, values, filler in (("input_ids", rows, pad_id), ("attention_mask", masks, 0)):
        fill = [[filler] * (length - len(row)) for row in values]
        filled[name] = [row + more if side == "right" else more + row for row, more in zip(values, fill, strict=True)]
    return filled


def to_tensors(batch: Mapping[str, Any]) -> Encoding:
    """Convert lists of equally long rows to int64 tensors."""
    for name, rows in batch.items():
        if len(lengths := sorted({len(row) for row in rows})) > 1:
            raise TokenizerError(
                f"{name} of lengths {lengths[0]} to {lengths[-1]} cannot be stacked; pass padding=True"
            )
    return Encoding({name: torch.tensor(rows, dtype=torch.int64) for name, rows in batch.items()})

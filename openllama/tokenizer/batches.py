"""Batches of id sequences: truncation, padding, masks and tensors.

    ids of two strings          [[5, 6, 7, 8], [9]]
    max_length=3, with eos = 2  [[5, 6, 2], [9, 2]]       eos counts: at most 2 other ids are kept
    padding=True, with pad = 3  [[5, 6, 2], [9, 2, 3]]
    attention_mask              [[1, 1, 1], [1, 1, 0]]

These functions do not need the tokenizer: its settings are their arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from openllama.errors import TokenizerError
from openllama.tokenizer.checks import one_of, positive_or_none, to_list

NO_MAX_LENGTH = int(1e30)  # HF's files store this for "no limit"
HIGHEST_LENGTH = 1e20  # a larger number means "no limit", too
NOT_TRUNCATED = (False, "do_not_truncate")
NOT_PADDED = (False, "do_not_pad")
#: columns that grow with the padding, and what they are filled with; ids with the pad token
FILLERS = {"attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1, "offset_mapping": (0, 0)}


class Encoding(dict[str, Any]):
    """A dict of ``input_ids``, ``attention_mask`` and what else was asked for: lists, tensors or arrays.

    Keys are also attributes; ``to`` moves the tensors.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"this encoding holds {', '.join(self)}; it has no {name}")
        return self[name]

    def to(self, device: str | int | torch.device, non_blocking: bool = False) -> Encoding:
        """Move every tensor to ``device``, in place; returns self."""
        if not all(isinstance(value, torch.Tensor) for value in self.values()):
            raise TokenizerError('only tensors can be moved to a device; encode with return_tensors="pt"')
        self.update({name: value.to(device, non_blocking=non_blocking) for name, value in self.items()})
        return self


# ---------------------------------------------------------------------- truncation


def room_for_text(
    truncation: bool | str | None,
    max_length: int | None,
    model_max_length: int,
    padding: bool | str,
    pad_to_multiple_of: int | None,
    special: int,
) -> int | None:
    """Number of ids that a string or a pair may keep, without its ``special`` bos and eos; None: no limit."""
    choices = (True, False, None, "longest_first", "only_first", "only_second", "do_not_truncate")
    one_of("truncation", truncation, choices)
    positive_or_none("max_length", max_length)
    if truncation is None:
        truncation = max_length is not None and padding is False
    limit = max_length or model_max_length
    if truncation in NOT_TRUNCATED or limit > HIGHEST_LENGTH:
        return None
    if limit < special:
        raise TokenizerError(f"max_length {limit} leaves no room for the {special} special tokens of each string")
    if padding not in NOT_PADDED and limit % (positive_or_none("pad_to_multiple_of", pad_to_multiple_of) or 1):
        raise TokenizerError(
            f"max_length {limit} is not a multiple of pad_to_multiple_of {pad_to_multiple_of}: rows would be padded "
            f"beyond it; use {limit // pad_to_multiple_of * pad_to_multiple_of or pad_to_multiple_of}"  # type: ignore[operator]
        )
    return limit - special


def kept(lengths: Sequence[int], room: int | None, truncation: bool | str | None) -> list[int]:
    """How many ids one sequence or each of a pair keeps.

    "longest_first" (True, None) shortens the longer one, then both in turn: 9 and 4 with room for 7 -> 4 and 3.
    """
    if truncation == "only_second" and len(lengths) == 1:
        raise TokenizerError("truncation='only_second' needs a pair of texts, got one; use True")
    if room is None or sum(lengths) <= room:
        return [*lengths]
    if len(lengths) == 1:
        return [room]
    if truncation in ("only_first", "only_second"):
        other = lengths[truncation == "only_first"]
        if other > room:
            name = "second" if truncation == "only_first" else "first"
            raise TokenizerError(
                f"truncation={truncation!r}: the {name} text alone has {other} tokens, with room for {room}; "
                "use 'longest_first' or a larger max_length"
            )
        return [room - other, other] if truncation == "only_first" else [other, room - other]
    first, second = lengths
    if room < 2 * min(lengths):
        return [room - room // 2, room // 2]
    return [room - second, second] if first > second else [first, room - first]


def joined(
    sequences: Sequence[list[Any]], counts: Sequence[int], side: str, before: list[Any], after: list[Any]
) -> list[Any]:
    """A row of one sequence or a pair: bos a eos bos b eos. Each keeps ``count`` values; ``side`` loses the others."""
    row: list[Any] = []
    for sequence, count in zip(sequences, counts, strict=True):
        first = 0 if side == "right" else len(sequence) - count
        row += before
        row += sequence[first : first + count]
        row += after
    return row


def special_mask(counts: Sequence[int], before: int, after: int) -> list[int]:
    """1 for the tokens around each sequence, 0 for its own: bos a a eos -> 1 0 0 1."""
    return [kind for count in counts for kind in (*[1] * before, *[0] * count, *[1] * after)]


def token_types(counts: Sequence[int], around: int) -> list[int]:
    """0 for the first sequence and the ``around`` tokens before and after it, 1 for the second."""
    return [number for number, count in enumerate(counts) for _ in range(count + around)]


# ---------------------------------------------------------------------- padding


def as_batch(encoded: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[Any]], bool]:
    """Columns of rows, from columns or from examples (dicts of one row each); and whether it was one single row."""
    if not isinstance(encoded, Mapping):
        for i, example in enumerate(encoded):
            if set(example) != set(encoded[0]):
                raise TokenizerError(
                    f"example {i} has {', '.join(map(str, example))}, example 0 {', '.join(map(str, encoded[0]))}; "
                    "all examples of a batch need the same keys"
                )
        encoded = {key: [example[key] for example in encoded] for key in (encoded[0] if encoded else ())}
    batch = {key: to_list(value) for key, value in encoded.items()}
    ids = batch.get("input_ids")
    is_single = isinstance(ids, (list, tuple)) and bool(ids) and isinstance(to_list(ids[0]), int)
    if is_single:
        batch = {key: [value] for key, value in batch.items()}
    batch = {key: [to_list(row) for row in value] for key, value in batch.items()}
    if not batch.get("input_ids") or not all(isinstance(row, list) for row in batch["input_ids"]):
        raise TokenizerError("pad takes a batch: input_ids must be a list of lists of ids and not empty")
    return batch, is_single


def padded(
    batch: Mapping[str, list[Any]],
    padding: bool | str,
    max_length: int,
    pad_to_multiple_of: int | None,
    pad_id: int | None,
    side: str,
) -> Encoding:
    """Pad the rows on ``side``, to ``max_length`` or to the longest row, rounded up to a multiple."""
    filled = Encoding(batch)
    one_of("padding", padding, (True, "longest", "max_length", *NOT_PADDED))
    multiple = positive_or_none("pad_to_multiple_of", pad_to_multiple_of) or 1
    if padding in NOT_PADDED:
        return filled
    if pad_id is None:
        raise TokenizerError("padding needs a pad token; tokenizer.pad_token = tokenizer.eos_token gives one")
    length = max_length if padding == "max_length" else max(map(len, batch["input_ids"]))
    if length > HIGHEST_LENGTH:
        raise TokenizerError("padding='max_length' needs max_length; the tokenizer has no model_max_length")
    length = -(-length // multiple) * multiple
    for name in filled.keys() & {"input_ids", *FILLERS}:
        filler = FILLERS.get(name, pad_id)
        fill = [[filler] * (length - len(row)) for row in batch[name]]
        filled[name] = [
            row + more if side == "right" else more + row for row, more in zip(batch[name], fill, strict=True)
        ]
    return filled


def to_tensors(batch: Mapping[str, list[Any]], kind: str) -> Encoding:
    """Convert columns of equally long rows to tensors ("pt") or arrays ("np"); what the tokenizer makes is int64."""
    return Encoding({name: _tensor(name, rows, kind) for name, rows in batch.items()})


def _tensor(name: str, rows: list[Any], kind: str) -> Any:
    ours = name == "input_ids" or name in FILLERS
    if len(lengths := sorted({len(row) for row in rows if isinstance(row, list)})) > 1:
        fix = "pass padding=True" if ours else "the tokenizer does not pad them: make them equally long"
        raise TokenizerError(f"{name} of lengths {lengths[0]} to {lengths[-1]} cannot be stacked; {fix}")
    try:
        if kind == "np":
            array = np.array(rows, dtype=np.int64 if ours else None)
            if array.dtype.kind not in "biuf":
                raise TypeError(f"dtype {array.dtype}")
            return array
        return torch.tensor(rows, dtype=torch.int64 if ours else None)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TokenizerError(f"{name} holds what no tensor can: {error}; leave that column out") from None

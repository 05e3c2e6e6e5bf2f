"""Keys and values of earlier tokens, so that a token is computed once.

Both caches index as ``cache[layer] -> (key, value)``, each (B, H, S, D), and take part in a forward
pass in two steps: every layer asks ``append`` for all keys and values so far, then the model calls
``advance`` once. Lengths after prompts of 3 tokens and 1 token: 0 -> 3 -> 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from openllama.config import OpenLlamaConfig
from openllama.errors import InputError

KeyValue: TypeAlias = tuple[Tensor, Tensor]


class GrowingCache(tuple[KeyValue, ...]):
    """A tuple of (key, value) pairs, one per layer, exactly as transformers 4.31 returns them.

    A forward pass makes a new one and leaves the one it was given as it is, so the same past can be
    continued twice and gradients flow through it.
    """

    def __repr__(self) -> str:
        return f"GrowingCache({len(self)} layers, {self.get_seq_length()} tokens)"

    def get_seq_length(self) -> int:
        """Number of cached tokens."""
        return self[0][0].shape[2] if self else 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        """All keys and values of ``layer``, the new ones last; nothing is stored yet."""
        if not self:
            return key, value
        past_key, past_value = self[layer]
        return torch.cat((past_key, key), dim=2), torch.cat((past_value, value), dim=2)

    def advance(self, layers: Sequence[KeyValue]) -> GrowingCache:
        """The cache after a forward pass whose layers returned these keys and values."""
        return GrowingCache(layers)

    def reorder(self, rows: Tensor) -> GrowingCache:
        """Row i becomes what row ``rows[i]`` was: for beams, and for repeating or selecting prompts."""
        return GrowingCache((key.index_select(0, rows), value.index_select(0, rows)) for key, value in self)

    def crop(self, length: int) -> GrowingCache:
        """The first ``length`` tokens."""
        _check_length(length)
        return GrowingCache((key[:, :, :length], value[:, :, :length]) for key, value in self)


class PreallocatedCache:
    """Room for ``max_length`` tokens, written in place: no allocation per step, inference only.

    Where the growing cache copies everything for each token, this one returns views of its storage. ``heads``: in this
    process, where tensor parallelism divides them; None for all.
    """

    def __init__(
        self,
        config: OpenLlamaConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        heads: int | None = None,
    ) -> None:
        shape = (batch_size, heads or config.num_attention_heads, max_length, config.head_dim)
        self.max_length = max_length
        self._length = 0
        self._layers: list[KeyValue] = [
            (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(config.num_hidden_layers)
        ]

    def __repr__(self) -> str:
        return f"PreallocatedCache({len(self)} layers, {self._length} of {self.max_length} tokens)"

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: int) -> KeyValue:
        key, value = self._layers[layer]
        return key[:, :, : self._length], value[:, :, : self._length]

    def __iter__(self) -> Iterator[KeyValue]:
        return (self[layer] for layer in range(len(self)))

    def get_seq_length(self) -> int:
        """Number of cached tokens."""
        return self._length

    def check_room(self, new: int) -> None:
        """Raise ``InputError`` where ``new`` more tokens do not fit."""
        if self._length + new > self.max_length:
            raise InputError(
                f"the cache has room for {self.max_length} tokens, {self._length} are in it, {new} are new"
            )

    def append(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        """Write the new keys and values after the old ones and return views of all of them."""
        end = self._length + key.shape[2]
        if (key.requires_grad or value.requires_grad) and torch.is_grad_enabled():
            raise InputError("PreallocatedCache is written in place and cannot carry gradients; use torch.no_grad()")
        keys, values = self._layers[layer]
        if keys.shape[1] != key.shape[1]:  # one head would be written to all
            raise InputError(
                f"the cache has room for {keys.shape[1]} heads, this process has {key.shape[1]}; "
                f"PreallocatedCache(..., heads={key.shape[1]})"
            )
        keys[:, :, self._length : end] = key
        values[:, :, self._length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, layers: Sequence[KeyValue]) -> PreallocatedCache:
        """Count the tokens that ``append`` wrote; until then they are not part of the cache."""
        self._length = layers[0][0].shape[2]
        return self

    @property
    def storage(self) -> Sequence[KeyValue]:
        """The whole memory of each layer, (B, H, max_length, D); who writes to it calls ``advance_by``."""
        return self._layers

    def advance_by(self, new: int) -> PreallocatedCache:
        """Count ``new`` tokens that were written to ``storage``."""
        self._length += new
        return self

    def reorder(self, rows: Tensor) -> PreallocatedCache:
        """Row i becomes what row ``rows[i]`` was; in place unless the number of rows changes."""
        for layer, (key, value) in enumerate(self._layers):
            if len(rows) == len(key):
                key[:, :, : self._length] = key[rows, :, : self._length]
                value[:, :, : self._length] = value[rows, :, : self._length]
            else:
                self._layers[layer] = key.index_select(0, rows), value.index_select(0, rows)
        return self

    def crop(self, length: int) -> PreallocatedCache:
        """Forget all but the first ``length`` tokens."""
        _check_length(length)
        self._length = min(self._length, length)
        return self


class Appended:
    """A cache for one layer that tells afterwards what was appended, should a hook have dropped it."""

    def __init__(self, cache: GrowingCache | PreallocatedCache) -> None:
        self.cache = cache
        self.key_value: KeyValue | None = None

    def append(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        """All keys and values of the layer."""
        self.key_value = self.cache.append(layer, key, value)
        return self.key_value


def _check_length(length: int) -> None:
    if length < 0:
        raise InputError(f"a cache cannot be cropped to {length} tokens")


Cache: TypeAlias = GrowingCache | PreallocatedCache

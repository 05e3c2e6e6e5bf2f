"""What a forward pass returns. Fields are read by name, by key, or by position among those that are not None."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from openllama.cache import Cache, GrowingCache
from openllama.errors import InputError


@dataclass(repr=False)
class ModelOutput(dict[str, Any]):  # trainers ask whether it is a dict
    """``out.logits``, ``out["logits"]``, ``out[0]``, ``out[:2]``, ``**out``, as in transformers."""

    def __post_init__(self) -> None:
        first = fields(self)[0].name
        if isinstance(given := getattr(self, first), (Mapping, Iterator)):  # accelerate and DataParallel give items
            setattr(self, first, None)
            for name, value in dict(given).items():
                setattr(self, name, value)

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in (known := [f.name for f in fields(self)]):
            raise InputError(f"an output has no field {name!r}; it has {', '.join(known)}")
        setattr(self, name, value)

    def _refuse(self, *args: Any, **named: Any) -> Any:
        raise InputError("an output keeps its fields; dataclasses.replace(output, loss=None) gives a changed copy")

    pop = popitem = setdefault = update = clear = __delitem__ = __or__ = __ror__ = __ior__ = _refuse

    def copy(self) -> Any:
        """Another output of the same values."""
        return dataclasses.replace(self)

    def __reversed__(self) -> Iterator[str]:
        return reversed(self.keys())

    def keys(self) -> list[str]:  # type: ignore[override]
        """Names of the fields that are set."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    def values(self) -> list[Any]:  # type: ignore[override]
        """The fields that are set."""
        return list(self.to_tuple())

    def items(self) -> list[tuple[str, Any]]:  # type: ignore[override]
        """Names and values of the fields that are set."""
        return list(zip(self.keys(), self.to_tuple(), strict=True))

    def get(self, key: str, default: Any = None) -> Any:
        """A field by name, or ``default`` where it is not set."""
        return self[key] if key in self.keys() else default

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are set, in order."""
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(f"{key}; this output has {', '.join(self.keys())}")
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={described(value)}" for name, value in self.items())
        return f"{type(self).__name__}({fields})"


def described(value: Any) -> str:
    """A value with shapes in place of numbers: "float32 (1, 17, 4600)", "4 x float32 (1, 17, 256)"."""
    if isinstance(value, Tensor):
        if value.ndim == 0 and not value.is_meta:
            return f"{value.item():.4g}"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, tuple) and not isinstance(value, GrowingCache) and value:
        return f"{len(value)} x {described(value[0])}"
    return repr(value)


@dataclass(repr=False)
class BaseModelOutput(ModelOutput):
    """Output of ``OpenLlamaModel``."""

    last_hidden_state: Tensor  # (B, T, C), after the final norm
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # layers + 1 of (B, T, C): inputs of the layers, last_hidden_state
    attentions: tuple[Tensor, ...] | None = None  # one (B, H, T, S) per layer


@dataclass(repr=False)
class CausalLMOutput(ModelOutput):
    """Output of ``OpenLlamaForCausalLM``; hidden states and attentions as in ``BaseModelOutput``."""

    loss: Tensor | None = None  # scalar float32 (float64 for a float64 model)
    logits: Tensor = None  # type: ignore[assignment]  # (B, T, V); with logits_to_keep only the last of T
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(repr=False)
class SequenceClassifierOutput(ModelOutput):
    """Output of ``OpenLlamaForSequenceClassification``; hidden states and attentions as in ``BaseModelOutput``."""

    loss: Tensor | None = None  # scalar float32 (float64 for a float64 model)
    logits: Tensor = None  # type: ignore[assignment]  # (B, num_labels), at each row's last token that is not padding
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


for _output in (BaseModelOutput, CausalLMOutput, SequenceClassifierOutput):  # so that torch.export accepts them
    torch.export.register_dataclass(_output, serialized_type_name=f"openllama.{_output.__name__}")

with contextlib.suppress(ImportError, AttributeError):  # torch has no public function to register a cache
    from torch.utils import _pytree

    _pytree.register_pytree_node(
        GrowingCache,
        lambda cache: (list(cache), None),
        lambda layers, context: GrowingCache(layers),
        serialized_type_name="openllama.GrowingCache",
        flatten_with_keys_fn=lambda cache: ([(_pytree.SequenceKey(i), layer) for i, layer in enumerate(cache)], None),
    )

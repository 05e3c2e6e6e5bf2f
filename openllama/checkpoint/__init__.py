"""Checkpoints on disk: names of weights, reading, writing, converting, verifying, comparing."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from openllama.checkpoint.adapters import convert_adapter
from openllama.checkpoint.names import expected_shapes, hf_to_native, native_to_hf
from openllama.checkpoint.reader import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from openllama.checkpoint.compare import Comparison, diff
    from openllama.checkpoint.contents import Inspection, inspect
    from openllama.checkpoint.conversion import convert
    from openllama.checkpoint.verification import Verification, verify

__all__ = [
    "Checkpoint",
    "Comparison",
    "Inspection",
    "Verification",
    "convert",
    "convert_adapter",
    "diff",
    "expected_shapes",
    "hf_to_native",
    "inspect",
    "native_to_hf",
    "open_checkpoint",
    "verify",
]

# No model needs these: they are imported when they are asked for, as they take a quarter of the time of the package.
_LATER = {
    "Comparison": "compare",
    "Inspection": "contents",
    "Verification": "verification",
    "convert": "conversion",
    "diff": "compare",
    "inspect": "contents",
    "verify": "verification",
}


if not TYPE_CHECKING:  # for which it would have any name

    def __getattr__(name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

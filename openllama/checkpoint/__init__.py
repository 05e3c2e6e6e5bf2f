"""Checkpoints on disk: names of weights, reading, writing, converting, verifying, comparing."""

from openllama.checkpoint.adapters import convert_adapter
from openllama.checkpoint.compare import Comparison, diff
from openllama.checkpoint.contents import Inspection, inspect
from openllama.checkpoint.convert import convert
from openllama.checkpoint.names import expected_shapes, hf_to_native, native_to_hf
from openllama.checkpoint.reader import Checkpoint, open_checkpoint
from openllama.checkpoint.verify import Verification, verify

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

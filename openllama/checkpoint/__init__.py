"""Checkpoints on disk: names of weights, reading, writing, converting, verifying."""

from openllama.checkpoint.adapters import convert_adapter
from openllama.checkpoint.convert import convert
from openllama.checkpoint.names import expected_shapes, hf_to_native, native_to_hf
from openllama.checkpoint.reader import Checkpoint, open_checkpoint
from openllama.checkpoint.verify import Inspection, Verification, inspect, verify

__all__ = [
    "Checkpoint",
    "Inspection",
    "Verification",
    "convert",
    "convert_adapter",
    "expected_shapes",
    "hf_to_native",
    "inspect",
    "native_to_hf",
    "open_checkpoint",
    "verify",
]

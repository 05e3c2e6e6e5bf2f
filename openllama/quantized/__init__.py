"""Weights in 8 or 4 bits: how numbers are rounded and stored, and the modules that compute with them."""

from openllama.quantized.modules import QuantizedEmbedding, QuantizedLinear, QuantizedSharedHead, quantize

__all__ = ["QuantizedEmbedding", "QuantizedLinear", "QuantizedSharedHead", "quantize"]

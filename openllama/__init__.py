"""Open-Llama in plain PyTorch. Reading order, which is also the order of imports:

config, errors      the numbers that shape a model
rope, masks, cache  positions, who sees whom, what is remembered
attention           one formula, three ways to compute it
model, heads        the decoder, and its projection to the vocabulary
tokenizer           text to ids and back
checkpoint          names, files and conversion
pretrained          what models inherit: loading and saving
generation          from logits to tokens
cli                 the command line
"""

from openllama.config import OpenLlamaConfig
from openllama.heads import OpenLlamaForCausalLM, OpenLlamaForSequenceClassification
from openllama.model import OpenLlamaModel
from openllama.tokenizer import OpenLlamaTokenizer

__version__ = "0.1.0"

__all__ = [
    "OpenLlamaConfig",
    "OpenLlamaForCausalLM",
    "OpenLlamaForSequenceClassification",
    "OpenLlamaModel",
    "OpenLlamaTokenizer",
]

"""Open-Llama in plain PyTorch.

To understand the model read ``config``, ``rope``, ``masks``, ``cache``, ``attention``, ``model`` and ``heads``, in
this order; for text, ``tokenizer`` and ``generation``. All modules in the order of their imports, none of which goes
down this list:

errors      everything that can be refused
config      the numbers that shape a model
modes       what torch is doing around us
inputs      what a forward pass may be given
rope        positions
masks       who sees whom
cache       what is remembered
attention   one formula, three ways to compute it
recompute   what training need not remember
outputs     what a forward pass returns
losses      what training minimises
surgery     fresh weights, and vocabularies of another size
tokenizer   text to ids and back
checkpoint  names, files and conversion
generation  from logits to tokens
pretrained  what models inherit: loading and saving
model       the decoder
heads       its projection to the vocabulary, or to classes
chat        conversations
cli         the command line
"""

from openllama.config import OpenLlamaConfig
from openllama.interface import OpenLlamaForCausalLM, OpenLlamaForSequenceClassification, OpenLlamaModel
from openllama.tokenizer import OpenLlamaTokenizer

__version__ = "0.1.0"

__all__ = [
    "OpenLlamaConfig",
    "OpenLlamaForCausalLM",
    "OpenLlamaForSequenceClassification",
    "OpenLlamaModel",
    "OpenLlamaTokenizer",
]

"""Open-Llama in plain PyTorch.

All modules in the order in which to read them, which is also the order of their imports:

errors      everything that can be refused
config      the numbers that shape a model
rope        positions
masks       which keys a query may see
cache       keys and values of earlier tokens
attention   one formula, three ways to compute it
model       the whole model, from token ids to logits; what follows serves it
checks      what a call may be given
outputs     what a call returns
dropin      arguments of transformers that there are not, and what to do instead
products    many rows at a time, in the way that is fast on a processor
losses      what training minimises
recompute   training in less memory
surgery     vocabularies of another size
compiler    loops in C++, built for the processor at hand
quantized   matrices in 8 or 4 bits
tokenizer   text to ids and back
checkpoint  names, files and conversion
generation  from logits to tokens
pretrained  what models inherit: loading and saving
interface   the three classes that people call
inference   decoding by compiled loops
parallel    more than one process
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

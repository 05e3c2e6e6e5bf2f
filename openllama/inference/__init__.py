"""Decoding at the speed of the memory: ``model = fast(model)``, then ``model.generate`` as before.

    model = OpenLlamaForCausalLM.from_pretrained(folder)
    quick = fast(model)
    quick.generate(ids, max_new_tokens=100)

The weights may be quantised: ``from_pretrained(folder, quantize="int8")`` or ``quantize(model, "int4")``.

decoding     the model that decodes by loops
loops        runs a pass
reading      the addresses of the weights, where the loops compute what the model does, and whether they still do
threshold    up to how many tokens the loops are faster
prompts      quantised matrices of prompts
structs      what the loops are given
kernels      builds and loads them
kernels.cpp  the loops: a pass of a few tokens through the whole model
"""

from openllama.inference.decoding import FastModel, fast
from openllama.quantized import quantize

__all__ = ["FastModel", "fast", "quantize"]

"""Decoding at the speed of the memory: ``model = fast(model)``, then ``model.generate`` as before.

    model = OpenLlamaForCausalLM.from_pretrained(folder)
    quick = fast(model)
    quick.generate(ids, max_new_tokens=100)

compiler     builds and loads the loops
kernels.cpp  the loops: a pass of a few tokens through the whole model
step         the model that uses them
"""

from openllama.inference.step import FastModel, fast

__all__ = ["FastModel", "fast"]

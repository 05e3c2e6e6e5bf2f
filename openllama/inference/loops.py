"""Runs a pass of the loops of ``kernels.cpp``."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from openllama.cache import PreallocatedCache
from openllama.inference.kernels import library
from openllama.inference.prompts import use_loops
from openllama.inference.reading import Reading, check_settings
from openllama.inference.structs import KINDS, Pass
from openllama.inference.threshold import ALWAYS, NEVER, most_rows, prompt_products
from openllama.interface import OpenLlamaForCausalLM
from openllama.products import FastProducts


class Loops:
    """A pass through the layers and the head of ``model``, whose weights are read where they lie.

    ``BackendError`` where the loops cannot be built or do not compute what the model's modules do.
    """

    def __init__(self, model: OpenLlamaForCausalLM) -> None:
        check_settings(model)
        self._library = library()
        use_loops(model)  # for prompts, and before the modules are read
        reading = Reading(model)
        self.config, self.have_changed = reading.config, reading.have_changed
        self._model, self._layers = reading.model, reading.layers
        self._work = torch.empty(0, dtype=torch.float32, device="cpu")
        self._dtype = model.dtype
        self._lock = threading.Lock()

    def take(self, rows: int) -> bool:
        """Whether this is no more tokens than the loops compute faster than libraries do."""
        if rows <= ALWAYS or rows > NEVER:
            return rows <= ALWAYS
        return rows <= most_rows(self._model.layers[0].up.kind, self._dtype, torch.get_num_threads())

    def prompt_products(self) -> FastProducts:
        """What multiplies the matrices of a prompt."""
        return prompt_products(self._dtype, torch.get_num_threads())()

    def fit(self, cache: PreallocatedCache, batch: int) -> bool:
        """Whether ``cache`` is memory of the CPU for ``batch`` sequences, as the loops write it."""
        config, keys = self.config, cache.storage[0][0]
        shape = (batch, config.num_attention_heads, cache.max_length, config.head_dim)
        return len(cache) == len(self._layers) and keys.shape == shape and keys.dtype in KINDS and keys.is_cpu

    def run(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: PreallocatedCache, keep: int
    ) -> Tensor:
        """Embedded tokens x (B, T, C), their turns (B, T, D), mask (B, S) -> logits (B, keep, V), all in float32.

        The keys and values are written to ``cache`` but not counted; x is overwritten.
        """
        (batch, length), past = x.shape[:2], cache.get_seq_length()
        logits = x.new_empty(batch, keep, self._model.head.rows)
        mask = None if mask is None else mask.to(torch.uint8).contiguous()
        threads = torch.get_num_threads()
        step = Pass(batch, length, past, cache.max_length, keep, threads)
        step.cos, step.sin, step.x = cos.data_ptr(), sin.data_ptr(), x.data_ptr()
        step.mask, step.logits = None if mask is None else mask.data_ptr(), logits.data_ptr()
        with self._lock:  # threads of a server share the memory of a pass
            room = self._library.openllama_room(self._model, batch, length, past, threads)
            if self._work.numel() < room:
                self._work = self._work.new_empty(room + 2**16)  # more, as the next pass needs a little more
            step.work = self._work.data_ptr()
            for layer, (key, value) in zip(self._layers, cache.storage, strict=True):
                layer.keys, layer.values = key.data_ptr(), value.data_ptr()
            self._model.cache_kind = KINDS[cache.storage[0][0].dtype]
            self._library.openllama_forward(self._model, step)
        return logits

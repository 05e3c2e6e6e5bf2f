"""A model that decodes by the loops of ``kernels.cpp``, and computes everything else as it did.

The loops take a pass of few tokens (decoding, guesses that are checked, a few sequences at a time) and read the weights
where the model has them: there is no second copy, and the model can be used beside. For many tokens at once the
products of libraries are faster, so a prompt goes through the modules of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from openllama import generation
from openllama.cache import PreallocatedCache
from openllama.errors import BackendError, warn
from openllama.inference.loops import Loops
from openllama.inference.structs import KINDS
from openllama.interface import OpenLlamaForCausalLM
from openllama.model import Inputs
from openllama.outputs import CausalLMOutput
from openllama.rope import cos_sin

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from openllama.config import OpenLlamaConfig
    from openllama.generation import GenerationConfig
    from openllama.generation.arguments import Arguments


def fast(model: OpenLlamaForCausalLM) -> FastModel:
    """``model`` with fast decoding on a CPU; the weights are shared, and ``model`` itself is as before.

    Where the loops cannot be built, or do not compute what this model does, a warning says why and the result decodes
    as the model does.
    """
    if isinstance(model, FastModel):
        return model
    if not isinstance(model, OpenLlamaForCausalLM):
        raise BackendError(f"fast decoding is for OpenLlamaForCausalLM, got {type(model).__name__}")
    return FastModel(model)


class FastModel:
    """``generate``, ``stream`` and calls of a model, decoding by the loops where they apply.

    Everything else is that of ``model``. In bfloat16 the numbers are nearer to those of float32 than the model's own:
    only weights and cache are bfloat16 here, all between is float32.
    """

    def __init__(self, model: OpenLlamaForCausalLM) -> None:
        self.model = model
        self._loops: Loops | None = None
        self._reason = ""
        self._refresh()

    if TYPE_CHECKING:  # of the model, found by __getattr__
        config: OpenLlamaConfig
        device: torch.device
        dtype: torch.dtype
        training: bool
        generation_config: GenerationConfig
        get_decoder: Callable[[], Callable[..., Any]]
        prepare_inputs_for_generation: Callable[..., dict[str, Any]]
        lm_head: Callable[[Tensor], Tensor]
        parameters: Callable[[], Iterable[Tensor]]
        embed: Callable[[Tensor], Tensor]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what was pickled, has addresses of its own."""
        return FastModel, (self.model,)

    def __repr__(self) -> str:
        return f"FastModel({self.model})"

    @property
    def attn_implementation(self) -> str:
        """The backend of prompts; the loops keep a preallocated cache, so eager, which does not, becomes sdpa."""
        name = self.model.attn_implementation
        return "sdpa" if name == "eager" and self._loops is not None else name

    def generate(self, input_ids: Tensor | None = None, **arguments: Any) -> Any:
        """As ``OpenLlamaForCausalLM.generate``."""
        self._refresh()
        return generation.generate(self, input_ids, **arguments)

    def stream(self, input_ids: Tensor | None = None, **arguments: Unpack[Arguments]) -> Iterator[Tensor]:
        """As ``OpenLlamaForCausalLM.stream``."""
        self._refresh()
        return generation.stream(self, input_ids, **arguments)

    def __call__(self, input_ids: Tensor | Inputs | None = None, *arguments: Any, **named: Any) -> Any:
        return self.forward(input_ids, *arguments, **named)

    def forward(self, input_ids: Tensor | Inputs | None = None, *arguments: Any, **named: Any) -> Any:
        """As ``OpenLlamaForCausalLM.forward``; the loops take the passes of ``generate`` that are of few tokens."""
        if isinstance(input_ids, Inputs) and (loops := self._loops_for(input_ids)) is not None:
            return self._decode(loops, input_ids, named["logits_to_keep"])
        return self.model(input_ids, *arguments, **named)

    def _refresh(self) -> None:
        """Look at the model as it is now; where the loops do not compute it, say so once."""
        try:
            self._loops = Loops(self.model)
        except BackendError as error:
            self._loops = None
            if str(error) != self._reason:
                warn(f"decoding is not fast: {error}")
            self._reason = str(error)

    def _loops_for(self, inputs: Inputs) -> Loops | None:
        """The loops, where they compute this pass as it is asked for."""
        cache, ids, mask = inputs.cache, inputs.tokens, inputs.mask
        if self._loops is None or torch.is_grad_enabled() or not inputs.use_cache:
            return None
        if inputs.output_attentions or inputs.output_hidden_states or (mask is not None and mask.ndim != 2):
            return None
        if ids.ndim != 2 or not self._loops.take(ids.numel()) or not isinstance(cache, PreallocatedCache):
            return None
        config, (keys, _) = self.config, cache.storage[0]
        shape = (len(ids), config.num_attention_heads, cache.max_length, config.head_dim)
        if mask is not None and mask.shape[1] != cache.get_seq_length() + ids.shape[1]:
            return None
        if keys.shape != shape or keys.dtype not in KINDS or len(cache) != config.num_hidden_layers:
            return None
        if cache.get_seq_length() == 0 or self._loops.have_changed():
            self._refresh()
        return self._loops

    def _decode(self, loops: Loops, inputs: Inputs, keep: int) -> CausalLMOutput:
        """Logits (B, keep, V) in float32, of all positions where ``keep`` is 0, and the cache with the new tokens."""
        cache: Any = inputs.cache
        (batch, length), past, config = inputs.tokens.shape, cache.get_seq_length(), self.config
        cache.check_room(length)
        positions = inputs.positions
        if positions is None:
            positions = torch.arange(past, past + length, device="cpu")[None]
        tables = cos_sin(positions, config.head_dim, config.rope_scaling, config.max_position_embeddings, past + length)
        cos, sin = (table.expand(batch, length, 1, config.head_dim).contiguous() for table in tables)
        x = self.model.embed(inputs.tokens).to(torch.float32, copy=True)
        logits = loops.run(x, cos, sin, inputs.mask, cache, min(keep or length, length))
        return CausalLMOutput(None, logits, cache.advance_by(length), None, None)

"""A model that decodes by the loops of ``kernels.cpp``, and computes everything else as it did.

The loops take a pass of few tokens (decoding, guesses that are checked, a few sequences at a time) and read the weights
where the model has them: there is no second copy, and the model can be used beside. A prompt goes through the
modules of the model, whose products are those of libraries or of the loops, whichever are faster.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from openllama import generation
from openllama.attention import BACKENDS
from openllama.cache import PreallocatedCache
from openllama.errors import BackendError, warn
from openllama.inference.loops import Loops
from openllama.inference.threshold import NEVER
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


def measure(model: FastModel) -> None:
    """Find out how many tokens the loops take at a time, which else the first pass of several tokens waits for."""
    if (loops := model._current()) is not None:
        loops.take(NEVER)


class FastModel:
    """``generate``, ``stream`` and calls of a model, decoding by the loops where they apply.

    Everything else is that of ``model``, to which assignments go, too. In bfloat16 the numbers are nearer to those of
    float32 than the model's own: only weights and cache are bfloat16 here, all between is float32.
    """

    def __init__(self, model: OpenLlamaForCausalLM) -> None:
        self._model = model
        self._loops: Loops | None = None
        self._reason = ""
        self._current()

    if TYPE_CHECKING:  # of the model, found by __getattr__
        config: OpenLlamaConfig
        device: torch.device
        dtype: torch.dtype
        training: bool
        generation_config: GenerationConfig
        get_decoder: Callable[[], Callable[..., Any]]
        lm_head: Callable[[Tensor], Tensor]
        parameters: Callable[[], Iterable[Tensor]]
        embed: Callable[[Tensor], Tensor]

    @property
    def model(self) -> OpenLlamaForCausalLM:
        """The model whose weights these are; for another, ``fast`` makes another."""
        return self._model

    @property
    def reason(self) -> str:
        """Why decoding is not fast, in the words of the warning; "" where it is."""
        self._current()
        return self._reason

    @property
    def prepare_inputs_for_generation(self) -> Callable[..., dict[str, Any]]:
        """The model's own, or what has replaced it."""
        return self.model.prepare_inputs_for_generation

    def __getattr__(self, name: str) -> Any:
        """What the model has; a method that returns the model, such as ``eval``, returns this."""
        found = getattr(self.model, name)
        if not (inspect.ismethod(found) and found.__self__ is self.model):
            return found

        @functools.wraps(found)
        def method(*arguments: Any, **named: Any) -> Any:
            result = found(*arguments, **named)
            return self if result is self.model else result

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("model", "_model", "_loops", "_reason"):
            super().__setattr__(name, value)
        else:
            setattr(self.model, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what was pickled, has addresses of its own."""
        return FastModel, (self.model,)

    @property
    def __wrapped__(self) -> OpenLlamaForCausalLM:
        """For ``inspect.unwrap``: the model that passes reach which the loops leave to it."""
        return self.model

    def __repr__(self) -> str:
        return f"FastModel({self.model})"

    @property
    def attn_implementation(self) -> str:
        """The backend of prompts; the loops keep a preallocated cache, so eager, which does not, becomes sdpa."""
        name = self.model.attn_implementation
        return "sdpa" if name == "eager" and self._current() is not None else name

    def generate(self, input_ids: Tensor | None = None, **arguments: Any) -> Any:
        """As ``OpenLlamaForCausalLM.generate``."""
        return generation.generate(self, input_ids, **arguments)

    def stream(self, input_ids: Tensor | None = None, **arguments: Unpack[Arguments]) -> Iterator[Tensor]:
        """As ``OpenLlamaForCausalLM.stream``."""
        return generation.stream(self, input_ids, **arguments)

    def __call__(self, input_ids: Tensor | Inputs | None = None, *arguments: Any, **named: Any) -> Any:
        return self.forward(input_ids, *arguments, **named)

    def forward(self, input_ids: Tensor | Inputs | None = None, *arguments: Any, **named: Any) -> Any:
        """As ``OpenLlamaForCausalLM.forward``; the loops take the passes of ``generate`` that are of few tokens."""
        if isinstance(input_ids, Inputs) and not arguments and named.keys() <= {"logits_to_keep", "return_dict"}:
            keep, loops = named.get("logits_to_keep", 0), self._loops_for(input_ids)
            if loops is not None and isinstance(keep, int) and keep >= 0:
                return self._decode(loops, input_ids, keep)
            with self._products():
                return self.model(input_ids, *arguments, **named)
        return self.model(input_ids, *arguments, **named)

    def _products(self) -> AbstractContextManager[Any]:
        """What prompts are computed under: products in the way that is fastest here."""
        if self._loops is None or torch.is_grad_enabled():
            return nullcontext()
        return self._loops.prompt_products()

    def _current(self) -> Loops | None:
        """The loops for the model as it is now; None where they do not compute it, which a warning says once."""
        loops, said, reason = self._loops, self._reason, ""
        if loops is not None and not loops.have_changed():
            return loops
        try:
            loops = Loops(self.model)
        except BackendError as error:
            loops, reason = None, str(error)
        self._loops, self._reason = loops, reason
        if reason not in ("", said):
            warn(f"decoding is not fast: {reason}")
        return loops

    def _loops_for(self, inputs: Inputs) -> Loops | None:
        """The loops, where they compute this pass as it is asked for."""
        cache, ids, mask = inputs.cache, inputs.tokens, inputs.mask
        if torch.is_grad_enabled() or not inputs.use_cache or inputs.backend not in BACKENDS:
            return None
        if inputs.output_attentions or inputs.output_hidden_states or ids.ndim != 2:
            return None
        if type(cache) is not PreallocatedCache:  # another may store elsewhere
            return None
        if mask is not None and mask.shape != (len(ids), cache.get_seq_length() + ids.shape[1]):
            return None
        loops = self._current()
        fits = loops is not None and loops.fit(cache, len(ids)) and loops.take(ids.numel())
        return loops if fits else None

    def _decode(self, loops: Loops, inputs: Inputs, keep: int) -> CausalLMOutput:
        """Logits (B, keep, V) in float32, of all positions where ``keep`` is 0, and the cache with the new tokens."""
        cache: Any = inputs.cache
        (batch, length), past, config = inputs.tokens.shape, cache.get_seq_length(), loops.config
        cache.check_room(length)
        positions = inputs.positions
        if positions is None:
            positions = torch.arange(past, past + length, device="cpu")[None]
        tables = cos_sin(positions, config.head_dim, config.rope_scaling, config.max_position_embeddings, past + length)
        cos, sin = (table.expand(batch, length, 1, config.head_dim).contiguous() for table in tables)
        x = self.model.model.embedding(inputs.tokens).to("cpu", torch.float32, copy=True)
        logits = loops.run(x, cos, sin, inputs.mask, cache, min(keep or length, length))
        return CausalLMOutput(None, logits, cache.advance_by(length), None, None)

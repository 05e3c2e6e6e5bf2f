"""A model that decodes by the loops of ``kernels.cpp``, and computes everything else as it did.

The loops take a pass of few tokens (decoding, guesses that are checked, a few sequences at a time) and read the weights
where the model has them: there is no second copy, and the model can be used beside. For many tokens at once the
products of libraries are faster, so a prompt goes through the modules of the model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from openllama import generation
from openllama.attention import BACKENDS
from openllama.cache import PreallocatedCache
from openllama.errors import BackendError, warn
from openllama.inference.compiler import library
from openllama.inference.structs import Layer, Matrix, Model, Pass
from openllama.interface import OpenLlamaForCausalLM, OpenLlamaModel
from openllama.model import MLP, Attention, DecoderLayer, Inputs, RMSNorm, SharedHead, StableEmbedding
from openllama.outputs import CausalLMOutput
from openllama.rope import cos_sin

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from openllama.generation.arguments import Arguments

KINDS = {torch.float32: 0, torch.bfloat16: 1}  # as in kernels.cpp
MOST_ROWS = 16  # tokens of a pass beyond which products of libraries are faster everywhere


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
        self._library: ctypes.CDLL | None = None
        self._weights: _Weights | None = None
        self._work = torch.empty(0)
        self._reason = ""
        self._refresh()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def __repr__(self) -> str:
        return f"FastModel({self.model})"

    @property
    def attn_implementation(self) -> str:
        """The backend of prompts; the loops keep a preallocated cache, so eager, which does not, becomes sdpa."""
        name = self.model.attn_implementation
        return "sdpa" if name == "eager" and self._weights is not None else name

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
        if isinstance(input_ids, Inputs) and self._applies(input_ids):
            return self._decode(input_ids, named["logits_to_keep"])
        return self.model(input_ids, *arguments, **named)

    def _refresh(self) -> None:
        """Take the addresses of the weights as they are now; where the loops do not apply, say so once."""
        try:
            self._library = library()
            self._weights = _Weights(self.model)
        except BackendError as error:
            self._weights = None
            if str(error) != self._reason:
                warn(f"decoding is not fast: {error}")
            self._reason = str(error)

    def _applies(self, inputs: Inputs) -> bool:
        """Whether the loops compute this pass as asked for."""
        asks_more = inputs.output_attentions or inputs.output_hidden_states or torch.is_grad_enabled()
        if self._weights is None or asks_more or not isinstance(inputs.cache, PreallocatedCache):
            return False
        ids, mask = inputs.tokens, inputs.mask
        is_small = ids.ndim == 2 and ids.numel() <= MOST_ROWS and (mask is None or mask.ndim == 2)
        if not is_small or not inputs.use_cache or inputs.cache.storage[0][0].dtype not in KINDS:
            return False
        if inputs.cache.get_seq_length() == 0 or self._weights.have_changed():
            self._refresh()
        return self._weights is not None

    def _decode(self, inputs: Inputs, keep: int) -> CausalLMOutput:
        """The logits (B, keep, V) in float32, of all positions where ``keep`` is 0, and the cache with the new tokens."""
        cache, weights, loops = inputs.cache, self._weights, self._library
        assert isinstance(cache, PreallocatedCache) and weights is not None and loops is not None  # _applies
        (batch, length), past = inputs.tokens.shape, cache.get_seq_length()
        keep = min(keep or length, length)
        cache.check_room(length)
        x = self.model.embed(inputs.tokens).float().clone(memory_format=torch.contiguous_format)
        cos, sin = self._turns(inputs, past, batch, length)
        mask = None if inputs.mask is None else inputs.mask.to(torch.uint8).contiguous()
        logits = x.new_empty(batch, keep, self.config.vocab_size)
        threads = torch.get_num_threads()
        work = self._room(loops.openllama_room(weights.model, batch, length, past, threads))
        step = Pass(batch, length, past, cache.max_length, keep, threads)
        step.cos, step.sin, step.x, step.logits, step.work = (t.data_ptr() for t in (cos, sin, x, logits, work))
        step.mask = None if mask is None else mask.data_ptr()
        weights.use(cache)
        loops.openllama_forward(weights.model, step)
        return CausalLMOutput(None, logits, cache.advance_by(length), None, None)

    def _turns(self, inputs: Inputs, past: int, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine of each new token, (B, T, D) in float32."""
        config, positions = self.config, inputs.positions
        if positions is None:
            positions = torch.arange(past, past + length)[None]
        tables = cos_sin(
            positions, config.head_dim, config.rope_scaling, config.max_position_embeddings, past + length
        )
        cos, sin = (table.expand(batch, length, 1, config.head_dim).contiguous() for table in tables)
        return cos, sin

    def _room(self, count: int) -> Tensor:
        """Memory for ``count`` floats, kept from pass to pass."""
        if self._work.numel() < count:
            self._work = torch.empty(count + 2**16)  # more, as the next pass needs a little more
        return self._work


class _Weights:
    """Where the weights of a model lie, as the loops want it; ``BackendError`` where they are not what loops read."""

    def __init__(self, model: OpenLlamaForCausalLM) -> None:
        _check(model)
        config, decoder = model.config, model.model
        self._tensors: list[Tensor] = []  # every tensor whose address the loops have
        self._hooks = [h for module in model.modules() for h in (module._forward_hooks, module._forward_pre_hooks)]
        self._layers = (Layer * len(decoder.layers))(*map(self._layer, decoder.layers))
        self.model = Model(self._layers, self._address(decoder.norm.weight), self._matrix(_head(model)))
        self.model.count, self.model.size = len(decoder.layers), config.hidden_size
        self.model.intermediate, self.model.eps = config.intermediate_size, config.rms_norm_eps
        self.model.heads, self.model.head_dim = config.num_attention_heads, config.head_dim
        self.model.norm_kind = KINDS[decoder.norm.weight.dtype]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]

    def have_changed(self) -> bool:
        """Whether weights have moved or somebody listens in, since these addresses were taken."""
        return any(self._hooks) or [tensor.data_ptr() for tensor in self._tensors] != self._addresses

    def use(self, cache: PreallocatedCache) -> None:
        """Let the layers read and write ``cache``."""
        for layer, (key, value) in zip(self._layers, cache.storage, strict=True):
            layer.keys, layer.values = key.data_ptr(), value.data_ptr()
        self.model.cache_kind = KINDS[cache.storage[0][0].dtype]

    def _layer(self, layer: DecoderLayer) -> Layer:
        norms = self._address(layer.attention_norm.weight), self._address(layer.mlp_norm.weight)
        return Layer(*norms, *map(self._matrix, _linears(layer)))

    def _matrix(self, module: nn.Module) -> Matrix:
        weight = module.weight
        return Matrix(self._address(weight), None, *weight.shape, KINDS[weight.dtype])

    def _address(self, tensor: Tensor) -> int:
        self._tensors.append(tensor)
        return tensor.data_ptr()


def _linears(layer: DecoderLayer) -> tuple[nn.Module, ...]:
    """In the order of ``Layer``."""
    attention, mlp = layer.attention, layer.mlp
    projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    return (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def _head(model: OpenLlamaForCausalLM) -> nn.Module:
    """The module that holds the matrix of the logits."""
    return model.get_input_embeddings() if isinstance(model.lm_head, SharedHead) else model.lm_head


def _check(model: OpenLlamaForCausalLM) -> None:
    """Raise ``BackendError`` unless the loops compute what this model's modules do."""
    config, decoder = model.config, model.model
    if model.device.type != "cpu":
        raise BackendError(f"the loops are for a CPU, the model is on {model.device}")
    if config.hidden_act not in ("silu", "swish"):
        raise BackendError(f"the loops compute silu, the model has hidden_act {config.hidden_act!r}")
    if model.attn_implementation not in BACKENDS:
        raise BackendError(f"the loops do not call the registered backend {model.attn_implementation!r}")
    if model.training and (config.attention_dropout_prob or config.hidden_dropout_prob):
        raise BackendError("the loops have no dropout; call model.eval()")
    layers: list[DecoderLayer] = list(decoder.layers)  # type: ignore[arg-type]
    expected: list[tuple[nn.Module, type[nn.Module]]] = [
        (decoder, OpenLlamaModel),
        (decoder.embedding, StableEmbedding),
        *((layer, DecoderLayer) for layer in layers),
        *((layer.attention, Attention) for layer in layers),
        *((layer.mlp, MLP) for layer in layers),
        *((norm, RMSNorm) for layer in layers for norm in (layer.attention_norm, layer.mlp_norm)),
        (decoder.norm, RMSNorm),
        *((linear, nn.Linear) for layer in layers for linear in _linears(layer)),
        (_head(model), nn.Embedding if isinstance(model.lm_head, SharedHead) else nn.Linear),
    ]
    for module, kind in expected:
        if type(module) is not kind or "forward" in vars(module):
            raise BackendError(f"the loops compute {kind.__name__}, the model has {type(module).__name__} in its place")
        if module._forward_hooks or module._forward_pre_hooks:
            raise BackendError(f"the loops run no hooks, and {type(module).__name__} has some")
        weight = getattr(module, "weight", None)
        if weight is not None and (weight.dtype not in KINDS or not weight.is_contiguous()):
            raise BackendError(f"the loops read contiguous float32 and bfloat16, the model has {weight.dtype}")

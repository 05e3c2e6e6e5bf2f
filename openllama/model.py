"""The Open-Llama decoder, top to bottom in the order data flows.

    token ids -> embedding (and its LayerNorm: "stable embedding") -> N decoder layers -> RMSNorm

A decoder layer is two residual lines: attention, then a gated MLP, each on a normalised copy of its
input. Shapes: B batch, T query length, S key length, H heads, D head dim, C hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openllama.attention import attention, check_backend, prepare_mask
from openllama.cache import Cache, KeyValue, PreallocatedCache, as_cache
from openllama.config import OpenLlamaConfig
from openllama.errors import InputError
from openllama.inputs import check_attention_mask, check_input_ids, check_inputs_embeds, check_position_ids
from openllama.masks import Mask
from openllama.modes import compute_dtype
from openllama.outputs import BaseModelOutput
from openllama.pretrained import PretrainedModel
from openllama.recompute import recomputed
from openllama.rope import cos_sin, rotate
from openllama.surgery import init_weights


class StableEmbedding(nn.Module):
    """Token ids (B, T) -> vectors (B, T, C); normalised where the config has ``use_stable_embedding``.

    The norm evens out the embeddings' scale early in training (Dettmers et al. 2021, section 2.3).
    """

    def __init__(self, config: OpenLlamaConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.padding_idx)
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-5) if config.use_stable_embedding else None

    def forward(self, input_ids: Tensor) -> Tensor:
        vectors = self.tokens(input_ids)
        return vectors if self.norm is None else self.norm(vectors)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in at least float32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype.itemsize < 4:  # training would keep a float32 copy
            return recomputed(self._normalised, x, self.weight)
        return self._normalised(x, self.weight)

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return weight * F.rms_norm(wide, weight.shape, eps=self.eps).to(x.dtype)


class Context(NamedTuple):
    """What the layers of one forward pass share."""

    rope: tuple[Tensor, Tensor]  # cosine and sine, (B | 1, T, 1, D/2)
    mask: Mask
    cache: Cache  # of the past, read by layer number
    backend: str


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions."""

    def __init__(self, config: OpenLlamaConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout_prob
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, layer: int, context: Context) -> tuple[Tensor, Tensor | None, KeyValue]:
        """x (B, T, C) -> output (B, T, C), weights (B, H, T, S) from eager only, all keys and values."""
        # Rotated before transposing: products round by memory layout, and HF's is (B, T, H, D) here.
        query = rotate(self._heads(self.q_proj(x)), *context.rope).transpose(1, 2)  # (B, H, T, D)
        key = rotate(self._heads(self.k_proj(x)), *context.rope).transpose(1, 2)
        value = self._heads(self.v_proj(x)).transpose(1, 2)
        key, value = context.cache.append(layer, key, value)  # (B, H, S, D)
        dropout = self.dropout if self.training else 0.0
        mixed, weights = attention(query, key, value, context.mask, dropout, context.backend)
        mixed = mixed.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)
        return self.o_proj(mixed), weights, (key, value)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # (B, T, C) -> (B, T, H, D)


def _gelu_new(x: Tensor) -> Tensor:
    """GELU's tanh approximation (Hendrycks & Gimpel 2016) spelt out: torch's own rounds differently."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_new,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)): SwiGLU when act is silu (Shazeer 2020)."""

    def __init__(self, config: OpenLlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = config.hidden_act
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        gated = recomputed(self._gated, self.gate_proj(x), self.up_proj(x))
        return self.dropout(self.down_proj(gated))

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return _ACTIVATIONS[self.activation](gate) * up


class DecoderLayer(nn.Module):
    """Normalise, apply, add; twice."""

    def __init__(self, config: OpenLlamaConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layer: int, context: Context) -> tuple[Tensor, Tensor | None, KeyValue]:
        """x (B, T, C) -> the same shape, and what ``Attention`` returns beside it."""
        mixed, weights, key_value = self.attention(self.attention_norm(x), layer, context)
        x = x + mixed
        x = x + self.mlp(self.mlp_norm(x))
        return x, weights, key_value


class OpenLlamaModel(PretrainedModel):
    """The decoder without a head; random weights (``from_pretrained`` loads trained ones).

    ``attn_implementation``: "eager", "sdpa", "xformers", or None for sdpa where the config has
    ``use_memory_efficient_attention`` and eager where not.
    """

    def __init__(self, config: OpenLlamaConfig, attn_implementation: str | None = None) -> None:
        super().__init__(config)
        self.embedding = StableEmbedding(config)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.set_attn_implementation(attn_implementation)
        init_weights(self, config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | Sequence[KeyValue] | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Token ids (B, T), or ``inputs_embeds`` (B, T, C), which skip the embedding and its norm.

        ``attention_mask``: (B, S) of 0/1 over cached and new tokens, or 4-D (bool or additive), which
        is used as it is and must carry causality. ``position_ids``: (B, T), by default counting on
        from the cache. Arguments left None take the config's value. Attentions come from the eager
        backend, whatever the model's own is. Raises ``InputError``.
        """
        config = self.config
        use_cache = self._use_cache(use_cache, past_key_values)
        want_attentions = config.output_attentions if output_attentions is None else output_attentions
        want_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states

        given, cache = self._check(input_ids, inputs_embeds, attention_mask, position_ids, past_key_values)
        x = given if inputs_embeds is not None else self.embedding(given.long())  # (B, T, C)
        context = self._context(x, attention_mask, position_ids, cache, "eager" if want_attentions else None)
        states: list[Tensor] = []
        weights: list[Tensor] = []
        keys_values: list[KeyValue] = []
        for i, layer in enumerate(self.layers):
            if want_states:
                states.append(x)
            x, layer_weights, key_value = self._run(layer, x, i, context)
            if want_attentions and layer_weights is not None:
                weights.append(layer_weights)
            if use_cache:
                keys_values.append(key_value)
        x = self.norm(x)

        output = BaseModelOutput(
            last_hidden_state=x,
            past_key_values=context.cache.advance(keys_values) if use_cache else None,
            hidden_states=(*states, x) if want_states else None,
            attentions=tuple(weights) if want_attentions else None,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _use_cache(self, use_cache: bool | None, past: object) -> bool:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if not (self.gradient_checkpointing and self.training):
            return use_cache
        if past is not None:
            raise InputError("past_key_values cannot be combined with gradient checkpointing; disable one of them")
        if use_cache:
            warnings.warn("use_cache is switched off while gradient checkpointing trains", stacklevel=4)
        return False

    def _check(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past: Cache | Sequence[KeyValue] | None,
    ) -> tuple[Tensor, Cache]:
        """Refuse what cannot be right before anything is computed: the input, and the past as a cache."""
        config = self.config
        if input_ids is not None and inputs_embeds is None:
            check_input_ids(input_ids, config.vocab_size)
            given, dtype = input_ids, self.dtype
        elif inputs_embeds is not None and input_ids is None:
            check_inputs_embeds(inputs_embeds, config.hidden_size)
            given, dtype = inputs_embeds, inputs_embeds.dtype
        else:
            raise InputError(
                f"give either input_ids or inputs_embeds, got {'neither' if input_ids is None else 'both'}"
            )
        batch, length = given.shape[:2]
        cache = as_cache(past, batch, config, dtype, given.device)
        key_length = cache.get_seq_length() + length
        if isinstance(cache, PreallocatedCache):
            cache.check_room(length)
        if position_ids is not None:
            check_position_ids(position_ids, batch, length)
        if attention_mask is not None:
            check_attention_mask(attention_mask, batch, length, key_length, config.num_attention_heads)
        return given, cache

    def _context(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache,
        backend: str | None,
    ) -> Context:
        """Everything about this call that all layers need, computed once."""
        config, backend = self.config, backend or self.attn_implementation
        length = x.shape[1]
        key_length = cache.get_seq_length() + length  # S
        if position_ids is None:
            position_ids = torch.arange(key_length - length, key_length, device=x.device)
        rope = cos_sin(
            position_ids.to(x.device).view(-1, length),
            config.head_dim,
            config.rope_scaling,
            config.max_position_embeddings,
            key_length,
            compute_dtype(x),
        )
        return Context(rope, prepare_mask(attention_mask, length, key_length, x, backend), cache, backend)

    def _run(self, layer: nn.Module, *inputs: Any) -> tuple[Tensor, Tensor | None, KeyValue]:
        """One layer; in training with gradient checkpointing its inner values are recomputed, not kept."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def set_attn_implementation(self, name: str | None) -> None:
        """Choose the attention backend; raises ``BackendError`` where it cannot run."""
        default = "sdpa" if self.config.use_memory_efficient_attention else "eager"
        self.attn_implementation = check_backend(name or default, self.device)

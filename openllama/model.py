"""Open-Llama from token ids to logits, top to bottom in the order data flows.

    ids -> embedding (and its LayerNorm: "stable embedding") -> N layers -> RMSNorm -> projection to the vocabulary

A layer is two residual lines: attention, then a gated MLP, each on a normalised copy of its input. Two things
distinguish Open-Llama from LLaMA: the LayerNorm in the embedding, and a projection that is the embedding table itself.

    model = CausalLM(config)
    logits, output = model(Inputs(ids))  # (B, T, V)
    logits, output = model(Inputs(next_ids, cache=output.past_key_values))

Only the computation is here. Arguments are trusted; ``interface.py`` checks them, loads weights and generates.
Shapes: B batch, T query length, S key length, H heads, D head dim, C hidden size, V vocabulary.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openllama.attention import attention
from openllama.cache import Cache, GrowingCache, KeyValue
from openllama.config import ACTIVATIONS, OpenLlamaConfig
from openllama.masks import Mask, prepare_mask
from openllama.rope import cos_sin, rotate


class Inputs(NamedTuple):
    """What one forward pass is given."""

    tokens: Tensor  # ids (B, T), or vectors (B, T, C), which skip the embedding and its norm
    mask: Tensor | None = None  # (B, S) of 0 (padding) and 1 over cached and new tokens; or 4-D, used as it is
    positions: Tensor | None = None  # (B | 1, T); None: counting on from the cache
    cache: Cache = GrowingCache(())  # keys and values of the tokens before
    backend: str = "eager"  # the way to compute attention
    use_cache: bool = True  # these three choose what is in the output
    output_attentions: bool = False
    output_hidden_states: bool = False


class Output(NamedTuple):
    """What one forward pass of the decoder returns."""

    last_hidden_state: Tensor  # (B, T, C), after the final norm
    past_key_values: Cache | None  # keys and values of all tokens so far
    hidden_states: tuple[Tensor, ...] | None  # layers + 1 of (B, T, C): input of each layer, then the last
    attentions: tuple[Tensor, ...] | None  # one (B, H, T, S) per layer


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
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)  # rounded to x's type before the product


class Context(NamedTuple):
    """What the layers of one forward pass share."""

    rope: tuple[Tensor, Tensor]  # cosine and signed sine, (B | 1, T, 1, D)
    mask: Mask
    cache: Cache  # of the tokens before, read by layer number
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
        heads = (*x.shape[:2], -1, self.head_dim)  # (B, T, C) -> (B, T, H, D)
        query, key, value = self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)
        cos, sin = context.rope
        cos, sin = cos.to(query.dtype), sin.to(query.dtype)  # under autocast the query is narrower than x
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, H, T, D)
        key, value = context.cache.append(layer, key, value)  # (B, H, S, D)
        dropout = self.dropout if self.training else 0.0
        mixed, weights = attention(query, key, value, context.mask, dropout, context.backend, layer)
        mixed = mixed.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)
        return self.o_proj(mixed), weights, (key, value)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)): SwiGLU when act is silu (Shazeer 2020)."""

    def __init__(self, config: OpenLlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACTIVATIONS[config.hidden_act]
        self.dropout = config.hidden_dropout_prob

    def forward(self, x: Tensor) -> Tensor:
        x = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return F.dropout(x, self.dropout, self.training)


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


class Decoder(nn.Module):
    """Embedding, layers and final norm: token ids -> hidden states."""

    def __init__(self, config: OpenLlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = StableEmbedding(config)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        init_weights(self, config)

    def forward(self, inputs: Inputs) -> Output:
        x = self.embedding(inputs.tokens) if inputs.tokens.ndim == 2 else inputs.tokens  # (B, T, C)
        context = self._context(x, inputs)
        states: list[Tensor] = []
        attentions: list[Any] = []
        keys_values: list[KeyValue] = []
        for number, layer in enumerate(self.layers):
            if inputs.output_hidden_states:
                states.append(x)
            x, weights, key_value = self._run_layer(layer, x, number, context)
            if inputs.output_attentions:
                attentions.append(weights)
            if inputs.use_cache:
                keys_values.append(key_value)
        x = self.norm(x)
        return Output(
            last_hidden_state=x,
            past_key_values=inputs.cache.advance(keys_values) if inputs.use_cache else None,
            hidden_states=(*states, x) if inputs.output_hidden_states else None,
            attentions=tuple(attentions) if inputs.output_attentions else None,
        )

    def _context(self, x: Tensor, inputs: Inputs) -> Context:
        """Positions and mask in the form the layers use them, computed once."""
        config, length = self.config, x.shape[1]
        past = inputs.cache.get_seq_length()
        key_length = past + length  # S
        positions = inputs.positions
        if positions is None:
            positions = torch.arange(past, key_length, device=x.device)[None]
        rope = cos_sin(
            positions, config.head_dim, config.rope_scaling, config.max_position_embeddings, key_length, x.dtype
        )
        mask = prepare_mask(inputs.mask, length, key_length, x, inputs.backend)
        return Context(rope, mask, inputs.cache, inputs.backend)

    def _run_layer(self, layer: nn.Module, *arguments: Any) -> tuple[Tensor, Tensor | None, KeyValue]:
        """One layer; a subclass may choose to compute it again in the backward pass."""
        return layer(*arguments)


class SharedHead(nn.Module):
    """Hidden states (B, T, C) -> logits (B, T, V) by the raw embedding table, without a norm or weight of its own."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.owner = (model,)  # a tuple, because a module here would be listed as a part of the head

    @property
    def weight(self) -> Tensor:
        """The table (V, C); if an adapter has replaced the module that holds it, the rows that the adapter returns."""
        tokens = self.owner[0].model.embedding.tokens
        if type(tokens).forward is nn.Embedding.forward:
            return tokens.weight
        return tokens.forward(torch.arange(len(tokens.weight), device=tokens.weight.device))  # without its hooks

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedHead:
        """In a copy of the model this uses the copied table; a copy of the head alone uses the same table."""
        head = memo[id(self)] = type(self).__new__(type(self))
        owner = memo.get(id(self.owner[0]), self.owner[0])
        vars(head).update(deepcopy({**vars(self), "owner": ()}, memo), owner=(owner,))
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)


class CausalLM(nn.Module):
    """The decoder and a projection to the vocabulary: token ids -> logits.

    The projection, ``lm_head``, is a ``SharedHead`` where the config has ``shared_input_output_embedding``. Else it is
    a matrix of its own, which with ``tie_word_embeddings`` holds the same tensor as the table.
    """

    lm_head: nn.Linear | SharedHead

    def __init__(self, config: OpenLlamaConfig, decoder: Decoder | None = None) -> None:
        super().__init__()
        self.model = decoder or Decoder(config)
        if config.shared_input_output_embedding:
            self.lm_head = SharedHead(self)
            return
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        init_weights(self.lm_head, config)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embedding.tokens.weight

    def forward(self, inputs: Inputs, logits_to_keep: int = 0) -> tuple[Tensor, Output]:
        """Logits (B, T, V), of the last ``logits_to_keep`` positions where that is not 0, and the decoder's output."""
        output = self.model(inputs)
        hidden = output.last_hidden_state[:, -logits_to_keep:]  # [:, -0:] is everything
        return self.lm_head(hidden), output


def init_weights(model: nn.Module, config: OpenLlamaConfig) -> None:
    """Draw fresh weights: matrices N(0, initializer_range), a stable embedding Xavier-normal, its padding row zero."""
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)) or module.weight.is_meta:
            continue  # nothing to draw on the meta device, where torch would import for seconds to find that out
        if isinstance(module, nn.Embedding) and config.use_stable_embedding:
            nn.init.xavier_normal_(module.weight)
        else:
            nn.init.normal_(module.weight, std=config.initializer_range)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx] = 0

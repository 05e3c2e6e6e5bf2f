"""The three classes that people call: the decoder, and the decoder with a head for tokens or for classes.

What they compute is ``model.py``. Here are the arguments and outputs of transformers 4.31.0, checked once where a call
comes in: what has been checked goes on as ``Inputs``, which ``forward`` takes as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openllama import generation
from openllama.attention import backend_with_weights, recomputed
from openllama.cache import Appended, Cache, KeyValue
from openllama.checkpoint.gather import is_spread
from openllama.checks import check_classification_labels, check_labels, check_tensor, checked_inputs, values_of
from openllama.config import OpenLlamaConfig
from openllama.errors import BackendError, ConfigError, InputError, warn
from openllama.generation import GenerateOutput, GenerationConfig
from openllama.generation.outputs import Streamer, compute_transition_scores
from openllama.generation.state import prepare_inputs_for_generation
from openllama.losses import causal_lm_loss, chunked_causal_lm_loss, classification_loss
from openllama.model import CausalLM, Context, Decoder, Inputs, SharedHead, init_weights
from openllama.outputs import BaseModelOutput, CausalLMOutput, SequenceClassifierOutput
from openllama.pretrained import PretrainedModel, register_with_fsdp, warn_of_unmatched_adapter

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from openllama.generation.arguments import Arguments


class OpenLlamaModel(PretrainedModel, Decoder):
    """The decoder without a head; random weights (``from_pretrained`` loads trained ones).

    ``attn_implementation``: "eager", "sdpa", "xformers", or None for sdpa where the config has
    ``use_memory_efficient_attention`` and eager where not.
    """

    def __init__(self, config: OpenLlamaConfig, attn_implementation: str | None = None) -> None:
        if config.quantization is not None:
            raise ConfigError(
                f"new weights are not quantised, the config says {config.quantization}: use from_pretrained, or make a "
                "model without quantization, then openllama.quantized.quantize(model)"
            )
        super().__init__(config)
        self.register_load_state_dict_post_hook(warn_of_unmatched_adapter)
        self.gradient_checkpointing = False
        self.checkpoint_arguments: dict[str, Any] = {}
        self.set_attn_implementation(attn_implementation)

    @overload  # type: ignore[override]  # takes HF's arguments, too
    def forward(
        self,
        input_ids: Tensor | Inputs | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | Sequence[KeyValue] | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: Literal[True] | None = None,
    ) -> BaseModelOutput: ...

    @overload
    def forward(self, *arguments: Any, return_dict: Literal[False], **named: Any) -> tuple[Any, ...]: ...

    @overload
    def forward(self, *arguments: Any, return_dict: bool, **named: Any) -> BaseModelOutput | tuple[Any, ...]: ...

    def forward(  # type: ignore[misc]  # the last two overloads are loose
        self,
        input_ids: Tensor | Inputs | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | Sequence[KeyValue] | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Token ids (B, T), or ``inputs_embeds`` (B, T, C), which skip the embedding and its norm: ``embed(ids)``.

        ``attention_mask``: (B, S) of 0/1 over cached and new tokens, or 4-D (bool or additive), which
        is used as it is and must carry causality. ``position_ids``: (B, T), by default counting on
        from the cache. Arguments left None take the config's value. Attentions come from the eager
        backend in place of a fused one. Raises ``InputError``.
        """
        tensors = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        inputs = self.checked(*tensors, use_cache, output_attentions, output_hidden_states)
        output = BaseModelOutput(*Decoder.forward(self, inputs))
        if any(weights is None for weights in output.attentions or ()):
            raise BackendError(
                f"a layer gave no attention weights: attn_implementation {inputs.backend!r} has none ('eager' does) or "
                "a hook on the layer returned the vectors alone"
            )
        return output if self._wants_dict(input_ids, return_dict) else output.to_tuple()

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module has Any

    def _run_layer(
        self, layer: nn.Module, x: Tensor, number: int, context: Context
    ) -> tuple[Tensor, Tensor | None, KeyValue]:
        """One layer, computed again in the backward pass where that is on; hooks may return the vectors alone."""
        run: Callable[..., Any] = layer
        if self.gradient_checkpointing and self.training:
            run = partial(checkpoint, recomputed(layer, x), **self.checkpoint_arguments)
        if not layer._forward_hooks:
            return run(x, number, context)
        appended: Any = Appended(context.cache)
        output = run(x, number, context._replace(cache=appended))
        key_value, appended.key_value = appended.key_value, None  # not kept until the backward pass
        return (output, None, key_value) if isinstance(output, Tensor) else output

    def checked(
        self,
        input_ids: Tensor | Inputs | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | Sequence[KeyValue] | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
    ) -> Inputs:
        """The arguments of a forward pass, checked and completed from the config; raises ``InputError``.

        ``Inputs`` have been checked before, and hold everything.
        """
        tensors = (attention_mask, position_ids, past_key_values, inputs_embeds)
        if isinstance(input_ids, Inputs):
            if not all(value is None for value in (*tensors, use_cache, output_attentions, output_hidden_states)):
                raise InputError("Inputs hold all arguments of a forward pass; give nothing beside them")
            return input_ids
        config = self.config
        attentions = config.output_attentions if output_attentions is None else output_attentions
        use_cache = self._use_cache(use_cache, past_key_values)
        return checked_inputs(config, self.dtype, input_ids, *tensors)._replace(
            backend=backend_with_weights(self.attn_implementation) if attentions else self.attn_implementation,
            use_cache=use_cache,
            output_attentions=attentions,
            output_hidden_states=config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        )

    def _use_cache(self, use_cache: bool | None, past: object) -> bool:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if not (self.gradient_checkpointing and self.training):
            return use_cache
        if past is not None:
            raise InputError("past_key_values cannot be combined with gradient checkpointing; disable one of them")
        if use_cache:
            warn("use_cache is switched off while gradient checkpointing trains")
        return False


class OpenLlamaForCausalLM(PretrainedModel, CausalLM):
    """The decoder and a projection to the vocabulary.

    Where the config has ``shared_input_output_embedding`` the projection ``lm_head`` uses the raw embedding table and
    has no weight of its own; with ``tie_word_embeddings`` it holds the same tensor.
    """

    model: OpenLlamaModel

    def __init__(self, config: OpenLlamaConfig, attn_implementation: str | None = None) -> None:
        super().__init__(config, OpenLlamaModel(config, attn_implementation))
        self.config = config
        self.generation_config = GenerationConfig.from_model_config(config)

    @overload  # type: ignore[override]  # takes HF's arguments, too
    def forward(
        self,
        input_ids: Tensor | Inputs | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | Sequence[KeyValue] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: Literal[True] | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput: ...

    @overload
    def forward(self, *arguments: Any, return_dict: Literal[False], **named: Any) -> tuple[Any, ...]: ...

    @overload
    def forward(self, *arguments: Any, return_dict: bool, **named: Any) -> CausalLMOutput | tuple[Any, ...]: ...

    def forward(  # type: ignore[misc]  # the last two overloads are loose
        self,
        input_ids: Tensor | Inputs | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | Sequence[KeyValue] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """As ``OpenLlamaModel.forward``, with logits (B, T, V) and, given ``labels`` (B, T), the loss.

        Labels are shifted inside: the logits at t are scored against the label at t + 1, and -100 is
        ignored. ``logits_to_keep`` computes logits for the last positions only; 0 means all.
        """
        tensors = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        inputs = self.model.checked(*tensors, use_cache, output_attentions, output_hidden_states)
        self._check_call(inputs.tokens, labels, logits_to_keep)
        logits, body = CausalLM.forward(self, inputs, logits_to_keep)
        loss = None if labels is None else causal_lm_loss(logits, labels)
        output = CausalLMOutput(loss, logits, body.past_key_values, body.hidden_states, body.attentions)
        return output if self._wants_dict(input_ids, return_dict) else output.to_tuple()

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module has Any

    def loss(self, input_ids: Tensor | None, labels: Tensor, **arguments: Any) -> Tensor:
        """The loss of ``forward(labels=...)`` without ever holding the (B, T, V) logits; for training.

        ``arguments`` are those of ``OpenLlamaModel.forward``. The head's weight is used directly: hooks
        on ``lm_head`` do not fire. A head that is more than a matrix, or is spread over processes, gets all its logits.
        """
        if register_with_fsdp(self, "loss"):
            return self.loss(input_ids, labels, **arguments)
        check_tensor("labels", labels)
        given = arguments.get("inputs_embeds") if input_ids is None else input_ids
        if isinstance(given, Tensor):
            self._check_call(given, labels, 0)
        hidden = self.model(input_ids, **{"use_cache": False, **arguments, "return_dict": True}).last_hidden_state
        is_matrix = type(self.lm_head) in (nn.Linear, SharedHead) and getattr(self.lm_head, "bias", None) is None
        weight = self.lm_head.weight if is_matrix else None  # once: an adapter computes it
        if weight is None or is_spread(weight):
            return causal_lm_loss(self.lm_head(hidden), labels)
        return chunked_causal_lm_loss(hidden, labels, weight)

    @overload
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        streamer: Streamer | None = None,
        return_dict_in_generate: Literal[False] = False,
        **arguments: Unpack[Arguments],
    ) -> Tensor: ...
    @overload
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        streamer: Streamer | None = None,
        return_dict_in_generate: Literal[True],
        **arguments: Unpack[Arguments],
    ) -> GenerateOutput: ...
    @overload
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        streamer: Streamer | None = None,
        return_dict_in_generate: bool,
        **arguments: Unpack[Arguments],
    ) -> Tensor | GenerateOutput: ...

    def generate(self, input_ids: Tensor | None = None, **arguments: Any) -> Tensor | GenerateOutput:
        """Continue ``input_ids`` (B, L): all ids, or with ``return_dict_in_generate=True`` a ``GenerateOutput``.

        Arguments: ``attention_mask`` (B, L), and the settings of ``GenerationConfig`` by name, such as
        ``max_new_tokens``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``num_beams``; the others are those
        of ``openllama.generation.prepare``. Prompts of different lengths are padded on the left. It calls the model
        that it is a method of: ``torch.compile(model).generate`` compiles nothing, ``model.compile()`` does.
        """
        return generation.generate(self, input_ids, **arguments)

    def stream(self, input_ids: Tensor | None = None, **arguments: Unpack[Arguments]) -> Iterator[Tensor]:
        """Continue ``input_ids`` (B, L) and yield the new tokens one by one, each (B,), as they are made."""
        return generation.stream(self, input_ids, **arguments)

    prepare_inputs_for_generation = prepare_inputs_for_generation  # a method, which adapters replace
    compute_transition_scores = staticmethod(compute_transition_scores)

    def _check_call(self, tokens: Tensor, labels: Tensor | None, logits_to_keep: int) -> None:
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise InputError(f"logits_to_keep must be a number of positions, 0 or more, got {logits_to_keep!r}")
        if isinstance(self.lm_head, SharedHead):
            self._check_table(tokens)
        if labels is None:
            return
        self._check_trains(tokens)
        if logits_to_keep:
            raise InputError(f"a loss needs all logits; pass labels or logits_to_keep={logits_to_keep}, not both")
        check_labels(labels, tokens.shape[:2], self.config.vocab_size)

    def _check_trains(self, tokens: Tensor) -> None:
        """Raise ``InputError`` for a loss in training mode that nothing of a quantised model can follow."""
        if self.config.quantization is None or not (self.training and torch.is_grad_enabled()):
            return
        if not tokens.requires_grad and not any(parameter.requires_grad for parameter in self.parameters()):
            raise InputError(
                f"the weights are quantised to {self.config.quantization} and are not trained: add adapters (peft), "
                "load the model without quantize, or call model.eval() where the loss alone is wanted"
            )

    def _check_table(self, tokens: Tensor) -> None:
        """Raise ``InputError`` where the embedding can use its table, and the head that shares it cannot."""
        table = self.model.embedding.tokens.weight
        if is_spread(table):
            raise InputError(
                "the embedding table is spread over processes apart from the head that shares it; shard the model as "
                "a whole (openllama.parallel.shard), and leave the table out of a tensor-parallel plan"
            )
        if table.is_meta and not tokens.is_meta:
            raise InputError(
                "the embedding table is on the meta device, and the head that shares it has no numbers: offload layers "
                "alone, and keep model.embedding on a device"
            )

    def get_output_embeddings(self) -> nn.Linear | SharedHead:
        """``lm_head``: hidden states (B, T, C) -> logits (B, T, V)."""
        return self.lm_head

    def set_output_embeddings(self, module: nn.Linear | SharedHead) -> None:
        """Replace ``lm_head``; where it is tied or shared, only a module that holds the embedding table will do."""
        if module is self.lm_head:
            return
        self._check_changeable()
        table = self.model.embedding.tokens.weight
        shared = isinstance(self.lm_head, SharedHead)
        if shared and module is self.get_input_embeddings():
            return
        if not isinstance(module, nn.Linear) or module.bias is not None:
            raise InputError(f"output embeddings must be an nn.Linear without bias, got {module}")
        if module.weight.shape != table.shape:
            raise InputError(f"output embeddings must be {tuple(table.shape)}, got {tuple(module.weight.shape)}")
        if (shared or self.config.tie_word_embeddings) and module.weight is not table:
            flag = "shared_input_output_embedding" if shared else "tie_word_embeddings"
            raise InputError(f"the config has {flag}: the output is the input table; use set_input_embeddings")
        if not shared:
            self.lm_head = module

    def tie_weights(self) -> None:
        """Make ``lm_head`` hold the embedding table itself where the config says so."""
        if self.config.tie_word_embeddings and not isinstance(self.lm_head, SharedHead):
            self.lm_head.weight = self.model.embedding.tokens.weight


class OpenLlamaForSequenceClassification(PretrainedModel):
    """The decoder and a linear classifier on the last token of each row that is not padding."""

    def __init__(self, config: OpenLlamaConfig, attn_implementation: str | None = None) -> None:
        super().__init__()
        self.model = OpenLlamaModel(config, attn_implementation)
        self.config = config
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        init_weights(self.score, config)

    @overload
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | Sequence[KeyValue] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: Literal[True] | None = None,
    ) -> SequenceClassifierOutput: ...

    @overload
    def forward(self, *arguments: Any, return_dict: Literal[False], **named: Any) -> tuple[Any, ...]: ...

    @overload
    def forward(
        self, *arguments: Any, return_dict: bool, **named: Any
    ) -> SequenceClassifierOutput | tuple[Any, ...]: ...

    def forward(  # type: ignore[misc]  # the last two overloads are loose
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | Sequence[KeyValue] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """As ``OpenLlamaModel.forward``, with logits (B, num_labels) and, given ``labels``, the loss.

        The last token that is not ``pad_token_id`` decides, whatever the attention mask says; the last
        of the row where there is no padding id or ``inputs_embeds`` are given. ``labels``: (B,)
        classes, or (B, num_labels) numbers; ``problem_type`` of the config, or their dtype, says which.
        """
        tensors = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        inputs = self.model.checked(*tensors, use_cache, output_attentions, output_hidden_states)
        last = self._last_token(inputs.tokens)
        if labels is not None:
            problem_type = check_classification_labels(labels, len(inputs.tokens), self.config)
        body = self.model(inputs)
        scores = self.score(body.last_hidden_state)  # (B, T, num_labels)
        logits = scores[torch.arange(len(scores), device=scores.device), last]
        loss = None if labels is None else classification_loss(logits, labels, problem_type)
        output = SequenceClassifierOutput(loss, logits, body.past_key_values, body.hidden_states, body.attentions)
        return output if self._wants_dict(input_ids, return_dict) else output.to_tuple()

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module has Any

    def _last_token(self, input_ids: Tensor) -> Tensor | int:
        """Index of the token that decides, per row (B,); of vectors (B, T, C) the last."""
        if input_ids.ndim == 3 or self.config.pad_token_id is None:
            return -1
        real = input_ids != self.config.pad_token_id
        if False in (rows := values_of(real, lambda real: real.any(-1)) or ()):
            raise InputError(
                f"row {rows.index(False)} of input_ids is nothing but padding (id {self.config.pad_token_id})"
            )
        positions = torch.arange(input_ids.shape[-1], device=input_ids.device)
        return (positions * real).argmax(-1)

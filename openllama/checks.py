"""What a forward pass may be given: a call from outside is checked here, once, and what comes out is trusted.

Shapes and types are always checked. Values are checked where there are any: not while torch traces, and not on the meta
device. On a GPU each check of values waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from openllama.cache import Cache, GrowingCache, KeyValue, PreallocatedCache
from openllama.config import OpenLlamaConfig
from openllama.errors import InputError, warn
from openllama.model import Inputs

PLAIN = (Tensor, nn.Parameter)  # the numbers of other types (fake, distributed) may be nowhere, or elsewhere


def values_of(tensor: Tensor, reduction: Callable[[Tensor], Tensor]) -> list[Any] | None:
    """The numbers in ``reduction(tensor)``, or None where there are none to read.

    That is while torch traces, on the meta device, and in ``torch.func``.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or tensor.is_meta or is_transformed(tensor):
        return None
    if type(tensor) not in PLAIN or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    return reduction(tensor).flatten().tolist()


def is_transformed(tensor: Tensor) -> bool:
    """Whether ``torch.func`` (grad, vmap, jvp) works on ``tensor``: a tensor that it wraps has no memory."""
    if torch.compiler.is_compiling() or type(tensor) not in PLAIN:
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:
        return True
    return False


def has_numbers(tensor: Tensor) -> bool:
    """Whether ``tensor`` is plain memory of a CPU and nothing else: not wrapped by ``torch.func``, and no tangent."""
    if not tensor.is_cpu or type(tensor) not in PLAIN or is_transformed(tensor):
        return False
    return torch.compiler.is_compiling() or forward_ad.unpack_dual(tensor).tangent is None


def checked_inputs(
    config: OpenLlamaConfig,
    dtype: torch.dtype,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | Sequence[KeyValue] | None,
    inputs_embeds: Tensor | None,
) -> Inputs:
    """The tensors of a call in the form that the model takes; raises ``InputError`` before anything is computed.

    ``dtype``: in which the model computes with ids. A padding mask of ones is dropped: it says nothing.
    """
    if isinstance(input_ids, torch.fx.Proxy):
        raise InputError("torch.fx.symbolic_trace cannot follow a model that checks its input; use torch.export.export")
    if input_ids is not None and inputs_embeds is None:
        check_input_ids(input_ids, config.vocab_size)
        tokens = input_ids.long()
    elif inputs_embeds is not None and input_ids is None:
        check_inputs_embeds(inputs_embeds, config.hidden_size)
        tokens, dtype = inputs_embeds, inputs_embeds.dtype
    else:
        raise InputError(f"give either input_ids or inputs_embeds, got {'neither' if input_ids is None else 'both'}")
    batch, length = tokens.shape[:2]
    cache = as_cache(past_key_values, batch, config, dtype, tokens.device)
    if isinstance(cache, PreallocatedCache):
        cache.check_room(length)
    if position_ids is None and not torch.compiler.is_compiling():
        warn_beyond_training(cache.get_seq_length() + length, config)
    if position_ids is not None:
        check_position_ids(position_ids, batch, length)
        position_ids = position_ids.to(tokens.device).view(-1, length)
    if attention_mask is not None:
        key_length = cache.get_seq_length() + length
        if check_attention_mask(attention_mask, batch, length, key_length, config.num_attention_heads):
            attention_mask = None
    return Inputs(tokens, attention_mask, position_ids, cache)


def warn_beyond_training(length: int, config: OpenLlamaConfig) -> bool:
    """Warn of a sequence that is longer than those of the training, if it is; scaled positions are meant for such."""
    limit = config.max_position_embeddings
    if length <= limit or config.rope_scaling is not None:
        return False
    # The text is always the same, so that it is shown once.
    warn(f"a sequence of more than {limit} tokens (max_position_embeddings): the model was not trained for it")
    return True


def is_integer(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # torch can do little else


def check_tensor(name: str, value: object) -> None:
    if isinstance(value, Mapping):
        raise InputError(f"{name} must be a tensor, got {type(value).__name__}; put ** in front of it")
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a tensor, got {type(value).__name__}; use torch.tensor(...)")


def check_input_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Token ids: integers of shape (B, T) inside the vocabulary, at least one."""
    check_tensor("input_ids", input_ids)
    if not is_integer(input_ids):
        raise InputError(f"input_ids must be integers, got {input_ids.dtype}")
    if input_ids.ndim != 2:
        raise InputError(f"input_ids must have shape (batch, length), got {tuple(input_ids.shape)}")
    if input_ids.numel() == 0:
        raise InputError(f"input_ids is empty, shape {tuple(input_ids.shape)}; give at least one token")
    low, high = values_of(input_ids, lambda ids: torch.stack(ids.aminmax())) or (0, 0)
    if low < 0 or high >= vocab_size:
        raise InputError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")


def check_inputs_embeds(inputs_embeds: Tensor, hidden_size: int) -> None:
    """Embedded input: floating point, shape (B, T, C), at least one token."""
    check_tensor("inputs_embeds", inputs_embeds)
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != hidden_size:
        raise InputError(f"inputs_embeds must be (batch, length, {hidden_size}), got {tuple(inputs_embeds.shape)}")
    if inputs_embeds.numel() == 0:
        raise InputError(f"inputs_embeds is empty, shape {tuple(inputs_embeds.shape)}; give at least one token")
    if not inputs_embeds.is_floating_point():
        raise InputError(f"inputs_embeds must be floating point, got {inputs_embeds.dtype}")


def check_position_ids(position_ids: Tensor, batch: int, length: int) -> None:
    """Positions: non-negative integers, (B, T), (1, T) or (T,)."""
    check_tensor("position_ids", position_ids)
    if not is_integer(position_ids):
        raise InputError(f"position_ids must be integers, got {position_ids.dtype}")
    if position_ids.shape not in ((length,), (1, length), (batch, length)):
        raise InputError(f"position_ids must be ({batch}, {length}), got {tuple(position_ids.shape)}")
    [low] = values_of(position_ids, Tensor.min) or [0]
    if low < 0:
        raise InputError(f"position_ids must not be negative, got {low}")


def check_attention_mask(mask: Tensor, batch: int, length: int, key_length: int, heads: int = 1) -> bool:
    """A padding mask of 0/1 or bool, (B, S), or a full mask (B | 1, H | 1, T, S), bool or additive.

    Returns whether it is a padding mask of nothing but ones.
    """
    check_tensor("attention_mask", mask)
    cached = key_length - length
    if mask.ndim == 4:
        fits = mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads) and mask.shape[2:] == (length, key_length)
        if not fits:
            raise InputError(
                f"a 4-D attention_mask must be ({batch}, 1, {length}, {key_length}), got {tuple(mask.shape)}"
            )
        if not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise InputError(f"a 4-D attention_mask must be bool or additive floating point, got {mask.dtype}")
        return False
    if mask.ndim != 2 or mask.shape[0] != batch:
        raise InputError(f"attention_mask must be ({batch}, {key_length}), got {tuple(mask.shape)}")
    if mask.shape[1] != key_length:
        raise InputError(
            f"attention_mask covers {mask.shape[1]} tokens, but there are {key_length}: "
            f"{cached} cached and {length} new; it must cover them all"
        )
    all_ones, sound = values_of(mask, _ones_and_zeros) or (False, True)
    if not sound:
        wrong = mask[(mask != 0) & (mask != 1)][0].item()
        raise InputError(
            f"a 2-D attention_mask holds only 1 (attend) and 0 (padding), got {wrong}; "
            "use a 4-D mask for additive values"
        )
    return all_ones


def _ones_and_zeros(mask: Tensor) -> Tensor:
    """Two booleans: whether all of ``mask`` is 1, and whether all of it is 0 or 1."""
    ones = mask == 1
    return torch.stack((ones.all(), (ones | (mask == 0)).all()))


def check_labels(labels: Tensor, shape: torch.Size, vocab_size: int) -> None:
    """Language-model labels: integers of the shape of the input; -100 is ignored."""
    check_tensor("labels", labels)
    if labels.shape != shape:
        raise InputError(f"labels must have the input's shape {tuple(shape)}, got {tuple(labels.shape)}")
    if not is_integer(labels):
        raise InputError(f"labels must be integers, got {labels.dtype}")
    _check_label_range(labels, vocab_size, f"the vocabulary of {vocab_size}")


def check_classification_labels(labels: Tensor, batch: int, config: OpenLlamaConfig) -> str:
    """The kind of problem that ``labels`` pose, after checking that they fit it.

    Where the config leaves ``problem_type`` open, one label means regression, integers mean a class
    per row (B,), and anything else a binary choice per label (B, num_labels), as in transformers.
    """
    check_tensor("labels", labels)
    count, kind = config.num_labels, config.problem_type
    if kind is None:
        kind = "single_label_classification" if is_integer(labels) else "multi_label_classification"
        kind = "regression" if count == 1 else kind
    per_row = kind == "single_label_classification" or count == 1
    shapes = [(batch,), (batch, 1)] if per_row else [(batch, count)]
    if tuple(labels.shape) not in shapes:
        raise InputError(f"labels for {kind} must have shape {shapes[0]}, got {tuple(labels.shape)}")
    if kind == "single_label_classification":
        if not is_integer(labels):
            raise InputError(f"labels for {kind} must be integers, got {labels.dtype}")
        _check_label_range(labels, count, f"the {count} classes of num_labels")
    return kind


def _check_label_range(labels: Tensor, count: int, what: str) -> None:
    def wrong(labels: Tensor) -> Tensor:
        return (labels != -100) & ((labels < 0) | (labels >= count))

    if any(values_of(labels, lambda labels: wrong(labels).any()) or ()):
        raise InputError(f"label {int(labels[wrong(labels)][0])} is outside {what} (-100 is ignored)")


def as_cache(
    past: Cache | Sequence[KeyValue] | None,
    batch: int,
    config: OpenLlamaConfig,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> Cache:
    """A cache from what a caller passed: one of ours or of HF, a tuple of pairs or of prefix tuning, or nothing.

    Raises ``InputError`` where layers, batch, heads, head size, dtype or device do not fit the model.
    """
    if past is None:
        return GrowingCache(())  # torch.compile cannot build it without an argument
    if not isinstance(past, (PreallocatedCache, Iterable)):
        raise InputError(f"past_key_values must be a cache or a tuple of (key, value) pairs, got {type(past).__name__}")
    if isinstance(past, (GrowingCache, PreallocatedCache)):
        cache: Cache = past
    else:
        cache = GrowingCache([_key_and_value(layer) for layer in past])
    if len(cache) not in (0, config.num_hidden_layers):
        raise InputError(f"past_key_values has {len(cache)} layers, the model {config.num_hidden_layers}")
    for layer, pair in enumerate(cache):
        if not (isinstance(pair, (tuple, list)) and [getattr(part, "ndim", 0) for part in pair] == [4, 4]):
            raise InputError(
                f"past_key_values of layer {layer} must be two tensors of 4 dimensions, (batch, heads, length, "
                f"head_dim), got {_shapes(pair)}"
            )
        key, value = pair
        wanted = (batch, _heads_here(config.num_attention_heads, key.shape[1]), cache.get_seq_length(), config.head_dim)
        if key.shape != wanted or value.shape != wanted:
            raise InputError(
                f"past_key_values of layer {layer} have shapes {tuple(key.shape)} and {tuple(value.shape)}, needed is "
                f"(batch, heads, length, head_dim) = {wanted}"
            )
        for part in (key, value):
            if part.dtype not in (dtype, _autocast_dtype(part.device)):
                raise InputError(f"past_key_values of layer {layer} are {part.dtype}, the model computes in {dtype}")
            if device is not None and part.device != device:
                raise InputError(f"past_key_values of layer {layer} are on {part.device}, the input on {device}")
    return cache


def _key_and_value(layer: Any) -> Any:
    """The pair in what prefix tuning gives for a layer, (2, B, H, S, D), or an iterated cache of transformers 5."""
    if isinstance(layer, Tensor) and layer.ndim == 5:
        return tuple(layer)
    return layer[:2] if isinstance(layer, tuple) and len(layer) == 3 and layer[2] is None else layer


def _heads_here(all_heads: int, found: int) -> int:
    """The number of heads that a cache must have: a process of tensor parallelism has a part of them."""
    is_part = torch.distributed.is_available() and torch.distributed.is_initialized() and found
    return found if is_part and all_heads % found == 0 else all_heads


def _shapes(pair: object) -> str:
    if not isinstance(pair, (tuple, list)):
        return f"a {type(pair).__name__}"
    shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in pair]
    return f"{len(pair)}: {', '.join(map(str, shapes))}"


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in on ``device``; None where it is off."""
    if not (torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)):
        return None
    return torch.get_autocast_dtype(device.type)

"""Names of weights: the table of HF's names and ours, and the check that a set of weights is a whole model.

Tensors are only renamed, never permuted, fused or changed. HF also stores each layer's rotary
frequencies (``inv_freq``); they follow from the configuration, so they are checked and dropped.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import reduce
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from openllama.config import NATIVE_TYPE, OpenLlamaConfig
from openllama.errors import ConfigError, InputError, KeyMismatchError, listed, warn
from openllama.model import CausalLM
from openllama.quantized.rounding import FORMATS, Format
from openllama.rope import frequencies

Shape = tuple[int, ...]
Layout = Literal["hf", "native"]
Head = Literal["body", "causal-lm", "classifier"]

PREFIX = "model."  # of the decoder's weights in a model with a head; a decoder saved alone has no prefix
HF_TO_NATIVE = {
    "model.embed_tokens.weight": "model.embedding.tokens.weight",
    "model.embed_layer_norm.weight": "model.embedding.norm.weight",
    "model.embed_layer_norm.bias": "model.embedding.norm.bias",
    "model.layers.N.input_layernorm.weight": "model.layers.N.attention_norm.weight",
    "model.layers.N.self_attn.q_proj.weight": "model.layers.N.attention.q_proj.weight",
    "model.layers.N.self_attn.k_proj.weight": "model.layers.N.attention.k_proj.weight",
    "model.layers.N.self_attn.v_proj.weight": "model.layers.N.attention.v_proj.weight",
    "model.layers.N.self_attn.o_proj.weight": "model.layers.N.attention.o_proj.weight",
    "model.layers.N.post_attention_layernorm.weight": "model.layers.N.mlp_norm.weight",
    "model.layers.N.mlp.gate_proj.weight": "model.layers.N.mlp.gate_proj.weight",
    "model.layers.N.mlp.up_proj.weight": "model.layers.N.mlp.up_proj.weight",
    "model.layers.N.mlp.down_proj.weight": "model.layers.N.mlp.down_proj.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "score.weight": "score.weight",
}
NATIVE_TO_HF = {native: hf for hf, native in HF_TO_NATIVE.items()}
INV_FREQ = "model.layers.N.self_attn.rotary_emb.inv_freq"  # only in HF; follows from the configuration
INV_FREQS = (INV_FREQ, "model.rotary_emb.inv_freq")  # the second of later versions of transformers
BUFFERS = (  # what versions of transformers and other trainers store beside weights: tables and masks, which follow too
    "model.layers.N.self_attn.bias",  # the causal mask, as in GPT-2
    "model.layers.N.self_attn.masked_bias",
    "model.layers.N.self_attn.rotary_emb.cos_cached",
    "model.layers.N.self_attn.rotary_emb.sin_cached",
    "model.rotary_emb.cos_cached",
    "model.rotary_emb.sin_cached",
    "model.rotary_emb.original_inv_freq",
)
WRAPPERS = (  # what trainers put in front of a name, or of the part of it that they wrap
    "module.",  # DistributedDataParallel, DeepSpeed
    "_orig_mod.",  # torch.compile
    "_forward_module.",  # Lightning's Fabric
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "base_model.model.",  # peft
)
EMBEDDING, LM_HEAD, SCORE = "model.embedding.tokens.weight", "lm_head.weight", "score.weight"
NORM = "model.embedding.norm.weight"  # of a stable embedding
MATRICES = {name for name in NATIVE_TO_HF if name.endswith("proj.weight")} | {EMBEDDING, LM_HEAD}  # may be quantised


def scale_name(name: str) -> str:
    """The name of the scales of a quantised matrix: ``lm_head.weight`` -> ``lm_head.scale``."""
    return name.removesuffix("weight") + "scale"


SCALES = {scale_name(name) for name in MATRICES}
HEADS = (LM_HEAD, scale_name(LM_HEAD), SCORE)
_FIRST_LAYER = f"{PREFIX}layers.0."
ARCHITECTURES: dict[Head, str] = {
    "body": "OpenLlamaModel",
    "causal-lm": "OpenLlamaForCausalLM",
    "classifier": "OpenLlamaForSequenceClassification",
}
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_TO_NATIVE = {"hf": HF_TO_NATIVE, "native": {name: name for name in (*NATIVE_TO_HF, *SCALES)}}
_WRAPPED = re.compile(rf"(?:(?<=\.)|^)(?:{'|'.join(map(re.escape, WRAPPERS))})+")
_LAYER_NUMBER = re.compile(r"(?<=^model\.layers\.)(0|[1-9]\d*)(?=\.)")


@dataclass
class Problems:
    """Everything wrong with a set of weights, to report it in one error."""

    unknown: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    duplicate: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    not_floating: list[str] = field(default_factory=list)
    mistyped: list[str] = field(default_factory=list)

    def check(self, hint: str = "Does the config.json belong to them?") -> None:
        """Raise ``KeyMismatchError`` that lists the first entries of each kind, if there are any."""
        titles = {
            "unknown": "not a weight of an Open-Llama",
            "unexpected": "not in the model that the configuration describes",
            "duplicate": "given twice",
            "missing": "missing",
            "misshaped": "of the wrong shape",
            "not_floating": "not of a floating-point type",
            "mistyped": "not of the type of the quantisation",
        }
        found = [(titles[name], entries) for name, entries in dataclasses.asdict(self).items() if entries]
        if found:
            parts = [f"{title} ({len(entries)}): {listed(entries)}" for title, entries in found]
            raise KeyMismatchError(f"the weights do not fit the configuration: {'; '.join(parts)}. {hint}")


@dataclass(frozen=True)
class Weights:
    """The weights of one model, by their full native names with ``model.``."""

    tensors: dict[str, Tensor]
    head: Head
    layout: Layout  # of the names in the source
    bare: bool  # the source has no ``model.``: a decoder saved alone

    def named_as_found(self) -> dict[str, Tensor]:
        """The weights by native names, with ``model.`` only if the source has it."""
        return _without_prefix(self.tensors) if self.bare else self.tensors

    @property
    def dtype(self) -> torch.dtype:
        """The type of all weights, or the narrowest type that holds each of them without rounding.

        Of a quantised model it is that of the weights that are not.
        """
        return reduce(torch.promote_types, {t.dtype for name, t in self.tensors.items() if is_plain(name, t.dtype)})

    def described_by(self, config: OpenLlamaConfig, dtype: torch.dtype | None = None) -> OpenLlamaConfig:
        """``config`` as a folder in native layout says it, with ``architectures`` and ``torch_dtype`` of these weights.

        ``dtype``: the type after a cast.
        """
        about = {
            "model_type": NATIVE_TYPE,
            "architectures": [ARCHITECTURES[self.head]],
            "torch_dtype": dtype_name(dtype or self.dtype),
        }
        return dataclasses.replace(config, extra={**config.extra, **about})


def dtype_name(dtype: torch.dtype) -> str:
    """A type's name without ``torch.``, as config.json and safetensors' users write it."""
    return str(dtype).removeprefix("torch.")


def floating_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Check the type of weights, given as a dtype or by name; None and "auto" give None."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in FLOATING:
        raise ConfigError(f"dtype {dtype} is not one of {', '.join(map(str, FLOATING))}")
    return found


@contextmanager
def without_numbers() -> Iterator[None]:
    """Modules made here have shapes but no numbers: they are on the meta device."""
    with torch.device("meta"), _NoNormal():
        yield


class _NoNormal(TorchFunctionMode):
    """Leaves ``nn.init.normal_`` out: on the meta device it imports torch's compiler, which takes a second."""

    def __torch_function__(
        self, function: Callable[..., Any], types: object, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if function is nn.init.normal_ else function(*args, **kwargs)


def is_plain(name: str, dtype: torch.dtype) -> bool:
    """Whether it is a weight by itself, neither the integers of a quantised matrix nor their scales."""
    return dtype in FLOATING and pattern(name) not in SCALES


def expected_shapes(config: OpenLlamaConfig, head: Head = "causal-lm") -> dict[str, Shape]:
    """Full native name -> shape of every weight that a file must hold; a tied ``lm_head`` is not among them.

    Where the config has ``quantization``, a matrix is an integer weight and a scale.
    """
    with without_numbers():
        model = CausalLM(dataclasses.replace(config, num_hidden_layers=1))
    one = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    shapes: dict[str, Shape] = {}
    for in_layer, group in groupby(one, key=lambda name: name.startswith(_FIRST_LAYER)):
        names = list(group)
        for number in range(config.num_hidden_layers if in_layer else 1):
            shapes |= {name.replace(_FIRST_LAYER, f"{PREFIX}layers.{number}."): one[name] for name in names}
    if head != "causal-lm":
        shapes.pop(LM_HEAD, None)
    if head == "classifier":
        shapes[SCORE] = (config.num_labels, config.hidden_size)
    return shapes if config.quantization is None else dict(_stored_shapes(shapes, FORMATS[config.quantization]))


def count_parameters(weights: Weights, config: OpenLlamaConfig) -> int:
    """Numbers in all weights; in those of a quantised matrix, not in how they are stored."""
    shapes = expected_shapes(dataclasses.replace(config, quantization=None), weights.head)
    return sum(math.prod(shapes[name]) for name in weights.tensors if pattern(name) not in SCALES)


def _stored_shapes(shapes: Mapping[str, Shape], form: Format) -> Iterator[tuple[str, Shape]]:
    for name, shape in shapes.items():
        if pattern(name) in MATRICES:
            weight, scale = form.shapes(*shape)
            yield name, weight
            yield scale_name(name), scale
        else:
            yield name, shape


def _expected_types(name: str, config: OpenLlamaConfig) -> tuple[torch.dtype, ...]:
    """The types that a weight of a model of ``config`` may have."""
    if config.quantization is None or pattern(name) not in MATRICES | SCALES:
        return FLOATING
    form = FORMATS[config.quantization]
    return (form.scale_dtype if pattern(name) in SCALES else form.weight_dtype,)


def check_layers(names: Collection[str], config: OpenLlamaConfig) -> None:
    """Raise ``KeyMismatchError`` if ``config`` has more than twice as many layers as there are weights for.

    Else a config.json could ask for any amount of time and memory, for modules, names and one line for each that is
    missing.
    """
    needed = sum(".N." in name for name in NATIVE_TO_HF) * config.num_hidden_layers
    if needed > 2 * len(names) + 20:
        raise KeyMismatchError(
            f"num_hidden_layers {config.num_hidden_layers} needs {needed} weights, there are {len(names)}. Does the "
            "config.json belong to them?"
        )


def layout_of(names: Collection[str]) -> Layout:
    """Return "hf" or "native", by names that only one layout has; raises ``KeyMismatchError`` if there are none."""
    patterns = {pattern(name) for name in names}
    if patterns & (HF_TO_NATIVE.keys() - NATIVE_TO_HF.keys()):
        return "hf"
    if patterns & (NATIVE_TO_HF.keys() - HF_TO_NATIVE.keys()):
        return "native"
    shown = listed(sorted(names)) or "no weights"
    raise KeyMismatchError(f"these are not the weights of an Open-Llama: expected HF's or native names, found {shown}")


def hf_to_native(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights from HF's names to ours; ``inv_freq`` is dropped, with a warning if its values are unusual.

    The decoder's names keep ``model.`` if they have it; native names are kept.
    Raises ``KeyMismatchError`` for unknown and duplicate names.
    """
    problems = Problems()
    found, inv_freq = _rename(state_dict, _TO_NATIVE[layout_of(state_dict)], problems)
    problems.check()
    _check_inv_freq(inv_freq)
    return _without_prefix(found) if _is_bare(state_dict) else found


def native_to_hf(state_dict: Mapping[str, Tensor], config: OpenLlamaConfig) -> dict[str, Tensor]:
    """Rename weights from our names to HF's and add what HF 4.31.0 also stores, so that strict loading works.

    This adds ``inv_freq`` of each layer, and ``lm_head.weight`` if it is tied. Raises
    ``KeyMismatchError`` unless the weights are exactly those of ``config``.
    """
    weights = select(state_dict, config)
    hf, _ = _rename(weights.tensors, NATIVE_TO_HF, Problems())
    if config.tie_word_embeddings and not config.shared_input_output_embedding and weights.head == "causal-lm":
        hf[LM_HEAD] = weights.tensors[EMBEDDING]
    for layer in range(config.num_hidden_layers):
        hf[INV_FREQ.replace(".N.", f".{layer}.")] = _implied_inv_freq(config.head_dim)
    return _without_prefix(hf) if weights.bare else hf


def select(tensors: Mapping[str, Tensor], config: OpenLlamaConfig, head: Head | None = None) -> Weights:
    """The weights that a model of ``config`` with ``head`` (None: the head found) needs, by native names.

    ``tensors`` may be in either layout. One ``KeyMismatchError`` lists all unknown, missing, duplicate
    and mis-shaped weights. A head that the model does not have is left out with a warning. A missing
    ``score.weight`` is not an error, because a classifier may begin with a new one.
    """
    problems = Problems()
    layout, bare = layout_of(tensors), _is_bare(tensors)
    found, inv_freq = _rename(tensors, _TO_NATIVE[layout], problems)
    if head is None:
        head = "classifier" if SCORE in found else "body" if bare else "causal-lm"
    expected = expected_shapes(config, head)
    unused = {name: found.pop(name) for name in HEADS if name in found and name not in expected}
    problems.unexpected += sorted(found.keys() - expected.keys())
    problems.missing += sorted(expected.keys() - found.keys() - {SCORE})
    for name in sorted(found.keys() & expected.keys()):
        _check_shape(name, found[name], expected[name], _expected_types(name, config), problems)
    for name, tensor in inv_freq.items():
        _check_shape(name, tensor, (config.head_dim // 2,), FLOATING, problems)
    problems.check(_hint(found, config))
    _check_inv_freq(inv_freq)
    _warn_unused(unused, found[EMBEDDING], config, head)
    return Weights({name: found[name] for name in expected if name in found}, head, layout, bare)


def unwrap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove ``WRAPPERS`` from all names; raises ``KeyMismatchError`` if two names become the same."""
    names: dict[str, str] = {}
    problems = Problems()
    for name in tensors:
        plain = _WRAPPED.sub("", name)
        if plain in names:
            problems.duplicate.append(f"{plain} (as {names[plain]} and {name})")
        names[plain] = name
    problems.check()
    return {plain: tensors[name] for plain, name in names.items()}


def without(tensors: Mapping[str, Tensor], patterns: Collection[str]) -> dict[str, Tensor]:
    """The tensors whose names match none of the shell ``patterns``; warns of the others.

    Raises ``InputError`` for a pattern that matches nothing.
    """
    ignored = {name for name in tensors for pattern in patterns if fnmatchcase(name, pattern)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in ignored):
            raise InputError(
                f"no weight matches {pattern!r}, which is to be ignored; the first is {next(iter(tensors))}"
            )
    if ignored:
        warn(f"ignored, as asked: {listed(sorted(ignored))}")
    return {name: tensor for name, tensor in tensors.items() if name not in ignored}


def _rename(
    tensors: Mapping[str, Tensor], table: Mapping[str, str], problems: Problems
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights by their new full names, and the ``inv_freq`` tensors by their old names."""
    sources: dict[str, str] = {}
    inv_freq: dict[str, Tensor] = {}
    buffers: list[str] = []
    for name, tensor in tensors.items():
        renamed = translate(name, table)
        if pattern(name) in INV_FREQS:
            inv_freq[name] = tensor
        elif pattern(name) in BUFFERS:
            buffers.append(name)
        elif renamed is None:
            problems.unknown.append(name)
        elif renamed in sources:
            problems.duplicate.append(f"{renamed} (as {sources[renamed]} and {name})")
        else:
            sources[renamed] = name
    if buffers:
        warn(f"{len(buffers)} buffers are not weights and are left out: {listed(buffers)}")
    return {renamed: tensors[name] for renamed, name in sources.items()}, inv_freq


def translate(name: str, table: Mapping[str, str]) -> str | None:
    """The full new name of ``name`` in ``table``, or None."""
    number = _LAYER_NUMBER.search(_full(name))
    translated = table.get(pattern(name))
    if translated is None or (number is None and ".N." in translated):
        return None
    return translated if number is None else translated.replace(".N.", f".{number[0]}.")


def _full(name: str) -> str:
    return name if name in HEADS or name.startswith(PREFIX) else PREFIX + name


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def pattern(name: str) -> str:
    """The name as it is in the table: ``layers.3.mlp...`` -> ``model.layers.N.mlp...``."""
    return _LAYER_NUMBER.sub("N", _full(name))


def is_buffer(name: str) -> bool:
    """Whether it is the name of a table or mask that follows from the configuration."""
    return pattern(name) in (*INV_FREQS, *BUFFERS)


def _is_bare(names: Collection[str]) -> bool:
    return not any(name in HEADS or name.startswith(PREFIX) for name in names)


def _check_shape(
    name: str, tensor: Tensor, expected: Shape, types: tuple[torch.dtype, ...], problems: Problems
) -> None:
    if tuple(tensor.shape) != expected:
        problems.misshaped.append(f"{name} is {tuple(tensor.shape)}, the configuration implies {expected}")
    if tensor.dtype not in types:
        (problems.not_floating if types == FLOATING else problems.mistyped).append(f"{name} is {tensor.dtype}")


def _hint(found: Mapping[str, Tensor], config: OpenLlamaConfig) -> str:
    """What to do about weights that do not fit ``config``."""
    has_scales = any(pattern(name) in SCALES for name in found)
    if config.quantization is not None and not has_scales:
        return f"They are not quantised; to round them, load them with quantize={config.quantization!r}"
    if has_scales and EMBEDDING in found:
        kinds = [name for name, form in FORMATS.items() if form.weight_dtype == found[EMBEDDING].dtype]
        return f"They are quantised; is their config.json the one with quantization {' or '.join(kinds)}?"
    if config.use_stable_embedding and NORM not in found and EMBEDDING in found:
        return (
            "They have no stable embedding, as a plain LLaMA; its config.json says model_type llama, or "
            "use_stable_embedding false and shared_input_output_embedding false"
        )
    if not config.use_stable_embedding and NORM in found:
        return (
            "They have a stable embedding, so they are an Open-Llama; its config.json says model_type open-llama, not "
            "llama, and not use_stable_embedding false"
        )
    return "Does the config.json belong to them?"


def _implied_inv_freq(head_dim: int) -> Tensor:
    return frequencies(head_dim, None, max_positions=1, key_length=1)


def _check_inv_freq(inv_freq: Mapping[str, Tensor]) -> None:
    """Warn if a table differs from RoPE with base 10000; a table rounded to 16 bits is accepted."""
    for name, table in inv_freq.items():
        implied = _implied_inv_freq(2 * table.numel())
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        if not any(torch.allclose(table.float(), implied.to(dtype).float(), rtol=1e-5, atol=1e-9) for dtype in dtypes):
            warn(
                f"{name} is not what the configuration implies, and is ignored; in HF, dynamic NTK scaling changes it "
                "after a long sequence"
            )


def _warn_unused(unused: Mapping[str, Tensor], embedding: Tensor, config: OpenLlamaConfig, head: Head) -> None:
    for name, tensor in unused.items():
        if name == scale_name(LM_HEAD):
            continue  # said of lm_head.weight
        if name == SCORE or head != "causal-lm":
            warn(f"{name} is not used: this model has no such head")
        elif config.shared_input_output_embedding:
            warn(f"{name} is not used: shared_input_output_embedding uses the embedding as head")
        elif tensor.dtype != embedding.dtype or not torch.equal(tensor, embedding):
            warn(f"{name} differs from {EMBEDDING} but tie_word_embeddings is set: the embedding is used for both")

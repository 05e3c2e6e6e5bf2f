"""Hands a model's weights to the loops of ``kernels.cpp`` and runs a pass."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor, nn

from openllama.attention import BACKENDS
from openllama.cache import PreallocatedCache
from openllama.errors import BackendError
from openllama.inference.compiler import library, most_rows
from openllama.inference.structs import KINDS, QUANTIZED, Layer, Matrix, Model, Pass
from openllama.interface import OpenLlamaForCausalLM, OpenLlamaModel
from openllama.model import MLP, Attention, DecoderLayer, RMSNorm, SharedHead, StableEmbedding
from openllama.quantized.modules import (
    IN_LAYER,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedMatrix,
    QuantizedSharedHead,
)
from openllama.quantized.rounding import restore_by


class Loops:
    """A pass through the layers and the head of ``model``, whose weights are read where they lie.

    ``BackendError`` where the loops cannot be built or do not compute what the model's modules do.
    """

    def __init__(self, model: OpenLlamaForCausalLM) -> None:
        _check(model)
        self._library = library()
        self._tensors: list[Tensor] = []  # every tensor whose address the loops have
        self._hooks = [h for module in model.modules() for h in (module._forward_hooks, module._forward_pre_hooks)]
        self._work = torch.empty(0, dtype=torch.float32, device="cpu")
        if model.config.quantization is not None:
            restore_by(restore)  # for prompts
        self._dtype = model.dtype
        self._lock = threading.Lock()
        self._model = self._addresses_of(model)
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]

    def take(self, rows: int) -> bool:
        """Whether this is no more tokens than the loops compute faster than libraries do."""
        return rows <= 2 or rows <= self._most_rows

    @functools.cached_property
    def _most_rows(self) -> int:
        return most_rows(self._dtype, torch.get_num_threads())

    def have_changed(self) -> bool:
        """Whether weights have moved or somebody listens in, since their addresses were taken."""
        return any(self._hooks) or [tensor.data_ptr() for tensor in self._tensors] != self._addresses

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

    def _addresses_of(self, model: OpenLlamaForCausalLM) -> Model:
        config, norm = model.config, model.model.norm.weight
        layers = [self._layer(layer) for layer in model.model.layers]
        self._layers = (Layer * len(layers))(*layers)
        return Model(
            layers=self._layers,
            norm=self._address(norm),
            head=self._matrix(_head(model)),
            count=len(layers),
            size=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            head_dim=config.head_dim,
            norm_kind=KINDS[norm.dtype],
            eps=config.rms_norm_eps,
        )

    def _layer(self, layer: Any) -> Layer:
        norms = self._address(layer.attention_norm.weight), self._address(layer.mlp_norm.weight)
        return Layer(*norms, *map(self._matrix, _linears(layer)))

    def _matrix(self, module: Any) -> Matrix:
        weight = module.weight
        if isinstance(module, QuantizedMatrix):
            shape = (len(weight), module.columns)
            return Matrix(self._address(weight), self._address(module.scale), *shape, QUANTIZED[module.bits])
        return Matrix(self._address(weight), None, *weight.shape, KINDS[weight.dtype])

    def _address(self, tensor: Tensor) -> int:
        self._tensors.append(tensor)
        return tensor.data_ptr()


def restore(weight: Tensor, scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor | None:
    """As ``quantized.rounding.restore_matrix``, on a CPU."""
    if not (weight.is_cpu and weight.is_contiguous() and scale.is_contiguous() and dtype in KINDS):
        return None
    if torch.compiler.is_compiling() or type(weight) is not Tensor:
        return None
    kind = QUANTIZED[8 if weight.dtype == torch.int8 else 4]
    matrix = Matrix(weight.data_ptr(), scale.data_ptr(), len(weight), columns, kind)
    out = weight.new_empty(len(weight), columns, dtype=dtype)
    library().openllama_restore(matrix, out.data_ptr(), KINDS[dtype], torch.get_num_threads())
    return out


def _linears(layer: Any) -> list[nn.Module]:
    """In the order of the struct ``Layer``."""
    return [layer.get_submodule(name) for name in IN_LAYER]


def _head(model: OpenLlamaForCausalLM) -> nn.Module:
    """The module that holds the matrix of the logits."""
    return model.get_input_embeddings() if isinstance(model.lm_head, SharedHead) else model.lm_head


def _check(model: OpenLlamaForCausalLM) -> None:
    """Raise ``BackendError`` unless the loops compute what this model's modules do."""
    config = model.config
    if model.device.type != "cpu":
        raise BackendError(f"the loops are for a CPU, the model is on {model.device}")
    if config.hidden_act not in ("silu", "swish"):
        raise BackendError(f"the loops compute silu, the model has hidden_act {config.hidden_act!r}")
    if model.attn_implementation not in BACKENDS:
        raise BackendError(f"the loops do not call the registered backend {model.attn_implementation!r}")
    if model.training and (config.attention_dropout_prob or config.hidden_dropout_prob):
        raise BackendError("the loops have no dropout; call model.eval()")
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise BackendError(f"the loops run no hooks, and {type(module).__name__} has some")
    for module, kind in _expected(model):
        if type(module) is not kind or "forward" in vars(module):
            raise BackendError(f"the loops compute {kind.__name__}, the model has {type(module).__name__} in its place")
        weight = None if isinstance(module, QuantizedMatrix) else getattr(module, "weight", None)
        if isinstance(weight, Tensor) and (weight.dtype not in KINDS or not weight.is_contiguous()):
            raise BackendError(f"the loops read contiguous float32 and bfloat16, the model has {weight.dtype}")


def _expected(model: OpenLlamaForCausalLM) -> list[tuple[nn.Module, type[nn.Module]]]:
    """The modules that a pass replaces, and what each must be."""
    decoder: Any = model.model
    modules: list[tuple[nn.Module, type[nn.Module]]] = [(decoder, OpenLlamaModel), (decoder.embedding, StableEmbedding)]
    for layer in decoder.layers:
        modules += [(layer, DecoderLayer), (layer.attention, Attention), (layer.mlp, MLP)]
        modules += [(layer.attention_norm, RMSNorm), (layer.mlp_norm, RMSNorm)]
        modules += [(linear, _linear_kind(linear)) for linear in _linears(layer)]
    modules += [(decoder.norm, RMSNorm)]
    table = model.get_input_embeddings()
    if isinstance(table, QuantizedEmbedding) and isinstance(model.lm_head, SharedHead):
        return [*modules, (model.lm_head, QuantizedSharedHead), (table, QuantizedEmbedding)]
    if isinstance(model.lm_head, SharedHead):
        return [*modules, (model.lm_head, SharedHead), (table, nn.Embedding)]
    return [*modules, (model.lm_head, _linear_kind(model.lm_head))]


def _linear_kind(module: nn.Module) -> type[nn.Module]:
    """Which of the two kinds of matrices a module has to be."""
    return QuantizedLinear if isinstance(module, QuantizedLinear) else nn.Linear

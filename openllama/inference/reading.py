"""Reads a model for the loops: each module, setting and weight is checked as it is read, and remembered.

So a pass can ask whether all is still as it was read, whoever changed it and in whichever way.
"""

from __future__ import annotations

from collections.abc import Collection
from operator import is_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from openllama.attention import BACKENDS
from openllama.checks import PLAIN, is_transformed
from openllama.errors import BackendError
from openllama.generation.state import has_own_inputs
from openllama.inference.structs import KINDS, QUANTIZED, Layer, Matrix, Model
from openllama.interface import OpenLlamaForCausalLM, OpenLlamaModel
from openllama.model import MLP, Attention, DecoderLayer, RMSNorm, SharedHead, StableEmbedding
from openllama.quantized.modules import (
    BITS,
    IN_LAYER,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedMatrix,
    QuantizedSharedHead,
)
from openllama.quantized.rounding import FORMATS

LINEARS = (nn.Linear, QuantizedLinear)
TABLES = (nn.Embedding, QuantizedEmbedding)
#: what each class computes, before somebody assigns another ``forward`` to it
FORWARDS = {
    kind: kind.forward
    for kind in (
        OpenLlamaForCausalLM, OpenLlamaModel, StableEmbedding, DecoderLayer, Attention, MLP, RMSNorm, nn.ModuleList,
        *LINEARS, *TABLES, SharedHead, QuantizedSharedHead,
    )
}  # fmt: skip


def check_settings(model: OpenLlamaForCausalLM) -> None:
    """Raise ``BackendError`` where it is plain that the loops do not compute this model: nothing is to be built."""
    if model.device.type != "cpu":
        raise BackendError(f"the loops are for a CPU, the model is on {model.device}")
    if model.dtype not in KINDS:
        raise BackendError(f"the loops read float32 and bfloat16, the model has {model.dtype}")
    if model.config.hidden_act not in ("silu", "swish"):
        raise BackendError(f"the loops compute silu, the model has hidden_act {model.config.hidden_act!r}")
    if not has_own_inputs(model):
        raise BackendError("the loops take the model's own inputs, its prepare_inputs_for_generation is replaced")


class Reading:
    """The addresses of a model's weights; ``BackendError`` where the loops do not compute what its modules do."""

    def __init__(self, model: OpenLlamaForCausalLM) -> None:
        self._places: list[dict[str, Any]] = []  # three of a length: a dictionary, a name, what was found there
        self._names: list[str] = []
        self._found: list[Any] = []
        self._modules: list[nn.Module] = []
        self._kinds: list[type[nn.Module]] = []
        self._own: list[dict[str, Any]] = []  # of each module: a forward of its own is one entry more
        self._tensors: list[Tensor] = []
        self._hooks: list[dict[int, Any]] = []
        self._read_hooks(model)
        self._checked(model, OpenLlamaForCausalLM)
        self._setting(model, "prepare_inputs_for_generation")  # checked before
        decoder: Any = self._module(model, "model", OpenLlamaModel)
        if (backend := self._setting(decoder, "_attn_implementation")) not in BACKENDS:
            raise BackendError(f"the loops do not call the registered backend {backend!r}")
        self.config = self._setting(decoder, "_config")
        norm: Any = self._module(decoder, "norm", RMSNorm)
        self._norm = norm.weight.dtype, self._setting(norm, "eps")  # of all norms
        self.layers = (Layer * self.config.num_hidden_layers)(*self._layers(decoder))
        self.model = self._struct(self._rms_norm(norm), self._head(model, decoder))
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._strides = list(map(Tensor.stride, self._tensors))
        self._dtypes = [tensor.dtype for tensor in self._tensors]
        self._sizes = [len(own) for own in self._own]

    def have_changed(self) -> bool:
        """Whether a module, a setting or a weight is another than was read, or somebody listens in since then."""
        return not (
            all(map(is_, map(dict.get, self._places, self._names), self._found))
            and all(map(is_, map(type, self._modules), self._kinds))
            and list(map(len, self._own)) == self._sizes
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and list(map(Tensor.stride, self._tensors)) == self._strides
            and [tensor.dtype for tensor in self._tensors] == self._dtypes
            and all(kind.forward is forward for kind, forward in FORWARDS.items())
            and not any(self._hooks)
        )

    def _read(self, place: dict[str, Any], name: str) -> Any:
        """What ``place`` has under ``name``, or None."""
        found = place.get(name)
        self._places.append(place)
        self._names.append(name)
        self._found.append(found)
        return found

    def _setting(self, module: nn.Module, name: str) -> Any:
        return self._read(vars(module), name)

    def _module(self, parent: nn.Module, name: str, *kinds: type[nn.Module]) -> nn.Module:
        """The module ``name`` of ``parent``, which must be exactly of one of ``kinds``."""
        return self._checked(self._read(parent._modules, name), *kinds)

    def _checked(self, module: Any, *kinds: type[nn.Module]) -> nn.Module:
        if type(module) not in kinds:
            found = type(module).__name__
            if found == kinds[0].__name__:  # peft's, for one
                found = f"{type(module).__module__}.{found}"
            raise BackendError(f"the loops compute {kinds[0].__name__}, the model has {found} in its place")
        if type(module).forward is not FORWARDS[type(module)]:
            raise BackendError(f"the loops compute the forward of {type(module).__name__}, which has been replaced")
        if "forward" in vars(module):
            raise BackendError(f"the loops compute {kinds[0].__name__}, the model has a forward of its own in one")
        self._modules.append(module)
        self._kinds.append(type(module))
        self._own.append(vars(module))
        return module

    def _tensor(
        self, owner: dict[str, Any], name: str, shape: tuple[int, ...], dtypes: Collection[torch.dtype]
    ) -> Tensor:
        """A weight, which must have its numbers in the memory of the CPU, one after the other."""
        tensor = self._read(owner, name)
        if type(tensor) not in PLAIN or is_transformed(tensor):
            raise BackendError(f"the loops read plain tensors, the model has {type(tensor).__name__} as a {name}")
        if tensor.dtype not in dtypes:
            raise BackendError(f"the loops read {_listed(dtypes)}, the model has {tensor.dtype}")
        if tensor.shape != shape:
            raise BackendError(f"the config says {shape} of a {name}, the model has {tuple(tensor.shape)}")
        if not (tensor.is_cpu and tensor.layout is torch.strided and tensor.is_contiguous()):
            raise BackendError(
                f"the loops read contiguous weights on a CPU, the model has a {name} {shape} with strides "
                f"{tensor.stride() if tensor.layout is torch.strided else tensor.layout} on {tensor.device}"
            )
        self._tensors.append(tensor)
        return tensor

    def _matrix(self, module: Any, rows: int, columns: int) -> Matrix:
        """The matrix of a linear module or a table."""
        if isinstance(module, QuantizedMatrix):
            bits = self._setting(module, "bits")
            form = FORMATS[BITS[bits]]
            shapes, buffers = form.shapes(rows, columns), module._buffers
            if self._setting(module, "columns") != columns:
                raise BackendError(f"the config says {columns} columns of a matrix, the model has {module.columns}")
            weight = self._tensor(buffers, "weight", shapes[0], (form.weight_dtype,))
            scale = self._tensor(buffers, "scale", shapes[1], (form.scale_dtype,))
            return Matrix(weight.data_ptr(), scale.data_ptr(), rows, columns, QUANTIZED[BITS[bits]])
        if self._read(module._parameters, "bias") is not None:
            raise BackendError("the loops add no bias, and a linear layer of the model has one")
        weight = self._tensor(module._parameters, "weight", (rows, columns), KINDS)
        return Matrix(weight.data_ptr(), None, rows, columns, KINDS[weight.dtype])

    def _rms_norm(self, norm: nn.Module) -> int:
        """The address of a norm's weight; all norms must be alike."""
        weight = self._tensor(norm._parameters, "weight", (self.config.hidden_size,), KINDS)
        found = weight.dtype, self._setting(norm, "eps")
        if found != self._norm or not isinstance(found[1], (int, float)):
            raise BackendError(
                f"the loops have one type and one eps for all norms, the model has {self._norm} and {found}"
            )
        return weight.data_ptr()

    def _layers(self, decoder: nn.Module) -> list[Layer]:
        layers: Any = self._module(decoder, "layers", nn.ModuleList)
        count = self.config.num_hidden_layers
        if len(layers) != count:
            raise BackendError(f"the config says {count} layers, the model has {len(layers)}")
        self._read(layers._modules, str(count))  # one that is appended is noticed
        return [self._layer(layers, str(number)) for number in range(count)]

    def _layer(self, layers: nn.Module, number: str) -> Layer:
        layer = self._module(layers, number, DecoderLayer)
        norms = [self._rms_norm(self._module(layer, name, RMSNorm)) for name in ("attention_norm", "mlp_norm")]
        attention, mlp = self._module(layer, "attention", Attention), self._module(layer, "mlp", MLP)
        if any(self._setting(module, "training") and self._setting(module, "dropout") for module in (attention, mlp)):
            raise BackendError("the loops have no dropout; call model.eval()")
        if (head_dim := self._setting(attention, "head_dim")) != self.config.head_dim:
            raise BackendError(f"the config says heads of {self.config.head_dim} dimensions, the model has {head_dim}")
        if (act := self._setting(mlp, "act")) is not F.silu:
            raise BackendError(f"the loops compute silu, the model has {act} in an MLP")
        size, inner = self.config.hidden_size, self.config.intermediate_size
        shapes = ((size, size),) * 4 + ((inner, size), (inner, size), (size, inner))
        paths = (name.split(".") for name in IN_LAYER)
        linears = (self._module(getattr(layer, parent), name, *LINEARS) for parent, name in paths)
        return Layer(*norms, *(self._matrix(linear, *shape) for linear, shape in zip(linears, shapes, strict=True)))

    def _head(self, model: OpenLlamaForCausalLM, decoder: nn.Module) -> Matrix:
        """The matrix of the logits: that of ``lm_head``, or the table that it shares."""
        shape = self.config.vocab_size, self.config.hidden_size
        embedding = self._module(decoder, "embedding", StableEmbedding)
        if not isinstance(model.lm_head, SharedHead):
            return self._matrix(self._module(model, "lm_head", *LINEARS), *shape)
        table = self._module(embedding, "tokens", *TABLES)
        kind = QuantizedSharedHead if isinstance(table, QuantizedEmbedding) else SharedHead
        head = self._module(model, "lm_head", kind)
        if self._setting(head, "owner")[0] is not model:
            raise BackendError("the loops read this model's table, its lm_head shares that of another")
        return self._matrix(table, *shape)

    def _struct(self, norm: int, head: Matrix) -> Model:
        config = self.config
        return Model(
            layers=self.layers,
            norm=norm,
            head=head,
            count=len(self.layers),
            size=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            head_dim=config.head_dim,
            norm_kind=KINDS[self._norm[0]],
            eps=self._norm[1],
        )

    def _read_hooks(self, model: nn.Module) -> None:
        of_all = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
        if any(of_all):
            raise BackendError("the loops run no hooks, and there are some for all modules")
        self._hooks += of_all
        for module in model.modules():
            hooks = module._forward_hooks, module._forward_pre_hooks
            if any(hooks):
                raise BackendError(f"the loops run no hooks, and {type(module).__name__} has some")
            self._hooks += hooks


def _listed(dtypes: Collection[torch.dtype]) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

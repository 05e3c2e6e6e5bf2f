"""Quantised modules in place of ``nn.Linear`` and ``nn.Embedding``, and ``quantize``, which puts them into a model.

The numbers are buffers, not parameters: they are not trained. Gradients flow through a product to its input, so
adapters beside it are trained as usual.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from openllama.errors import InputError
from openllama.model import SharedHead
from openllama.products import BLOCK, MANY, bfloat16_is_slow, int8_is_slow
from openllama.quantized.rounding import FORMATS, check_finite, check_quantization, naming, restore_matrix, round_matrix

Model = TypeVar("Model", bound=nn.Module)
BITS = {form.bits: name for name, form in FORMATS.items()}
#: the matrices of each layer, in the order in which they are used
IN_LAYER = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


class QuantizedMatrix(nn.Module):
    """A matrix (M, K) as the buffers ``weight`` and ``scale`` of ``rounding``; their types never change."""

    weight: Tensor
    scale: Tensor
    #: what restores the matrix; a model that decodes fast has the same in C++
    restore: Callable[[Tensor, Tensor, int, torch.dtype], Tensor] = staticmethod(restore_matrix)
    #: x (N, K) of ``MANY`` rows or more, weight, scale -> (N, M) or None; a model that decodes fast has one in C++
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor | None] = staticmethod(lambda x, weight, scale: None)

    def __init__(self, rows: int, columns: int, bits: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        if bits not in BITS:
            raise InputError(f"bits must be 8 or 4, got {bits!r}")
        self.bits, self.columns = bits, columns
        form = FORMATS[BITS[bits]]
        weight, scale = form.shapes(rows, columns)
        self.register_buffer("weight", torch.zeros(weight, dtype=form.weight_dtype, device=device))
        self.register_buffer("scale", torch.zeros(scale, dtype=form.scale_dtype, device=device))

    def numel(self) -> int:
        """Numbers of the matrix."""
        return len(self.weight) * self.columns

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (M, K)."""
        return self.restore(self.weight, self.scale, self.columns, dtype)

    def _round(self, matrix: Tensor) -> None:
        self.weight, self.scale = round_matrix(matrix, BITS[self.bits])

    def _product(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., M)."""
        if torch.is_grad_enabled() and (x.requires_grad or self.scale.requires_grad):
            return _Product.apply(x, self.scale, self)
        return self._product_of(x)

    def _product_of(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.columns)  # else torch may take a batched product, with a copy of the matrix
        if x.is_cpu and x.dtype == torch.bfloat16 and len(flat) >= MANY and not torch.compiler.is_compiling():
            if self.bits == 8 and not int8_is_slow():
                return _int8_product(flat, self.weight, self.scale).view(*x.shape[:-1], len(self.weight))
            if bfloat16_is_slow():
                if (product := self.multiply(flat, self.weight, self.scale)) is not None:
                    return product.view(*x.shape[:-1], len(self.weight))
                flat = flat.float()
        product = x.new_empty(len(flat), len(self.weight))
        for rows, block in self._blocks(flat):
            product[:, rows] = F.linear(flat, block)
        return product.view(*x.shape[:-1], len(self.weight))

    def _blocks(self, x: Tensor) -> Any:
        """Slices of rows, and these rows in the type of x."""
        in_blocks = x.is_cpu and not torch.compiler.is_compiling()
        step = max(1, BLOCK // self.columns) if in_blocks else len(self.weight)
        for start in range(0, len(self.weight), step):
            rows = slice(start, start + step)
            yield rows, self.restore(self.weight[rows], self.scale[rows], self.columns, x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedMatrix:
        """``to``, ``half`` and others move the numbers; the stored types are kept."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Refuse numbers of another type, which would be cast: those of a model that is not quantised, or otherwise."""
        for name, buffer in self.named_buffers():
            given = state_dict.get(prefix + name, buffer)
            if given.dtype != buffer.dtype:
                raise InputError(
                    f"{prefix}{name} is {given.dtype}, a module of {self.bits} bits has {buffer.dtype}: load the "
                    "weights into a model that is not quantised, then quantise it"
                )
        super()._load_from_state_dict(state_dict, prefix, *others)

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedMatrix:
        if requires_grad:
            raise InputError(_UNTRAINED)
        return self


_UNTRAINED = (
    "quantised weights are not trained: train adapters beside them, or load the model without quantize and train it"
)


def _int8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (N, K) @ matrix.T of integers: each row of x is rounded to int8 with a scale of its own."""
    q, scales = torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x), 1, dtype=torch.float32)
    product = x.new_empty(len(x), len(weight))
    parts = [slice(start, start + MANY) for start in range(0, len(x), MANY)]  # what a cache holds
    for part in parts:
        rows = x[part].float()
        scales[part] = rows.abs().amax(1, keepdim=True) / 127
        q[part] = rows.div_(scales[part].clamp(min=torch.finfo(torch.float32).tiny)).round_()
    sums = torch._int_mm(q, weight.T)
    for part in parts:
        product[part] = sums[part].float().mul_(scales[part]).mul_(scale)
    return product


class _Product(torch.autograd.Function):
    """x @ matrix.T, whose matrix is restored again for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, module: QuantizedMatrix) -> Tensor:
        if scale.requires_grad:
            raise InputError(_UNTRAINED)
        ctx.module = module
        return module._product_of(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = (grad[..., rows] @ block for rows, block in ctx.module._blocks(grad))
        total = next(parts)
        for part in parts:
            total += part
        return total, None, None


class QuantizedLinear(QuantizedMatrix):
    """x (..., K ``in_features``) -> (..., M ``out_features``) in the type of x, as an ``nn.Linear`` without bias."""

    def __init__(
        self, in_features: int, out_features: int, bits: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__(out_features, in_features, bits, device)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def of(cls, linear: nn.Linear, bits: int) -> QuantizedLinear:
        """``linear``, rounded; on the meta device without numbers."""
        if linear.bias is not None:
            raise InputError("a linear layer with a bias cannot be quantised; the layers of Open-Llama have none")
        module = cls(linear.in_features, linear.out_features, bits, linear.weight.device)
        module._round(linear.weight)
        return module.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class QuantizedEmbedding(QuantizedMatrix):
    """Token ids (...) -> rows (..., C) in ``dtype``; ``project`` is the head that shares the table."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, bits, device)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.dtype = dtype

    @classmethod
    def of(cls, embedding: nn.Embedding, bits: int) -> QuantizedEmbedding:
        """``embedding``, rounded; on the meta device without numbers."""
        weight = embedding.weight
        sizes = embedding.num_embeddings, embedding.embedding_dim
        module = cls(*sizes, bits, weight.dtype, embedding.padding_idx, weight.device)
        module._round(weight)
        return module.train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.flatten()
        weight, scale = self.weight.index_select(0, flat), self.scale.index_select(0, flat)
        rows = self.restore(weight, scale, self.embedding_dim, self.dtype)
        return rows.view(*ids.shape, self.embedding_dim)

    def project(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V) by the table."""
        return self._product(hidden)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedMatrix:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, dtype={self.dtype}"


class QuantizedSharedHead(SharedHead):
    """A shared or tied head that computes with the stored numbers of the embedding, of which there is one copy."""

    def forward(self, hidden: Tensor) -> Tensor:
        table: Any = self.owner[0].model.embedding.tokens
        return table.project(hidden)


def quantize(model: Model, quantization: str) -> Model:
    """Round the matrices of ``model`` to "int8" or "int4", in place and one by one, so that its memory falls.

    These are the table of embeddings, those of the layers and ``lm_head``; a shared or tied head uses the rounded
    table. Norms and a classifier's ``score`` stay as they are, and are frozen. Raises ``InputError`` for a model with
    other modules in these places, for NaN and infinity, and for what is no module, before anything is changed.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"quantize rounds the modules of a model, got {type(model).__name__}; give the model itself, of one that "
            "decodes fast its .model"
        )
    places = _places(model, quantization)
    for name in places:
        with naming(f"{name}.weight"):
            check_finite(model.get_submodule(name).weight)  # type: ignore[arg-type]
    for name in places:
        parent, _, own = name.rpartition(".")
        module = model.get_submodule(name)
        kind: Any = QuantizedLinear if isinstance(module, nn.Linear) else QuantizedEmbedding
        setattr(model.get_submodule(parent), own, kind.of(module, FORMATS[quantization].bits))
        del module  # before the next is rounded
    if hasattr(model, "lm_head") and "lm_head" not in places:
        model.lm_head = QuantizedSharedHead(model)  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.config = dataclasses.replace(model.config, quantization=quantization)  # type: ignore[type-var]
    return model


def _places(model: Any, quantization: str) -> list[str]:
    """Names of the modules to quantise; raises ``InputError`` where they are not the model's own."""
    check_quantization(quantization, model.config.quantization)
    config = model.config
    layers = [f"layers.{number}.{part}" for number in range(config.num_hidden_layers) for part in IN_LAYER]
    prefix = "" if model.base_model is model else "model."
    names = [f"{prefix}{name}" for name in ("embedding.tokens", *layers)]
    if hasattr(model, "lm_head") and not (config.shared_input_output_embedding or config.tie_word_embeddings):
        names.append("lm_head")
    for name in names:
        module = model.get_submodule(name)
        if type(module) not in (nn.Linear, nn.Embedding):
            raise InputError(
                f"{name} is a {type(module).__name__}, which cannot be quantised; merge or remove adapters first "
                "(peft: merge_and_unload)"
            )
        if getattr(module, "bias", None) is not None:
            raise InputError(f"{name} has a bias and cannot be quantised; the layers of Open-Llama have none")
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            raise InputError(f"{name} has hooks, which would be lost; remove them, quantise, and register them again")
    return names

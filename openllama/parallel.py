"""A model on several processes: weights sharded by FSDP2 or split by tensor parallelism, and loaded as such.

    mesh = init_device_mesh("cuda", (world_size,))
    model = load(OpenLlamaForCausalLM, folder, lambda model: shard(model, mesh=mesh))  # each process reads its part
    model.loss(ids, labels).backward()
    model.save_pretrained(folder)  # called by all, written by the first

The engine is PyTorch's: ``fully_shard``, ``parallelize_module`` and DTensor. Here is what they need to know of this
model. docs/distributed.md has whole programs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from openllama.checkpoint.names import LM_HEAD, PREFIX, SCORE, floating_dtype, select, without_numbers
from openllama.checkpoint.reader import open_checkpoint
from openllama.config import OpenLlamaConfig
from openllama.dropin import LOADING, without_neutral
from openllama.errors import InputError, KeyMismatchError
from openllama.pretrained import PretrainedModel

Model = TypeVar("Model", bound=PretrainedModel)


def shard(model: Model, *, reshard_after_forward: bool | int | None = None, **options: Any) -> Model:
    """Shard the weights of ``model`` over processes by FSDP2, each layer by itself and the rest together; in place.

    Each process computes with its own rows of a batch, and gradients are averaged. Arguments are those of
    ``torch.distributed.fsdp.fully_shard``: ``mesh``, ``mp_policy``, ``offload_policy``; ``reshard_after_forward`` is
    of the layers. ``model.loss`` and ``model.generate`` work as they do in one process. Processes communicate in
    every forward pass, so that all must make the same number of them, in ``generate``, too.
    """
    # Keys and values are views, and nothing changes them in place, which is what torch warns of.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDP(DecoderLayer|OpenLlama\w+)\) returned a view")
    for layer in model.base_model.get_submodule("layers").children():
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(model, **options)
    return model


def tensor_parallel(model: Model, mesh: DeviceMesh) -> Model:
    """Split the layers of ``model`` over the processes of a one-dimensional ``mesh``; in place.

    All processes compute with the same ids, and each gets all logits. Sampling needs the same seed in all of them.
    Raises ``InputError`` where heads or the MLP cannot be divided by the processes.
    """
    plan = tensor_parallel_plan(model.config, mesh.size())
    if model.base_model is model:
        plan = {name.removeprefix(PREFIX): style for name, style in plan.items()}
    parallelize_module(model, mesh, {name: style for name, style in plan.items() if _has(model, name)})
    return model


def tensor_parallel_plan(config: OpenLlamaConfig, processes: int) -> dict[str, ParallelStyle]:
    """How ``parallelize_module`` splits a model of ``config``: name of a module -> style (Shoeybi et al. 2019).

    Each process computes some heads and some columns of the MLP; a layer communicates twice, after ``o_proj`` and
    ``down_proj``. The embedding table stays whole: a token reads one row of it, and it may be the head as well. A head
    of its own is split along the vocabulary, since every token reads all of it. Raises ``InputError``.
    """
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(config, name) % processes:
            raise InputError(
                f"{name} {getattr(config, name)} is not divisible by the {processes} processes of the mesh"
            )
    layer = f"{PREFIX}layers.*."
    columns = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan: dict[str, ParallelStyle] = {layer + name: ColwiseParallel() for name in columns}
    plan |= {layer + name: RowwiseParallel() for name in ("attention.o_proj", "mlp.down_proj")}
    if not (config.shared_input_output_embedding or config.tie_word_embeddings):
        plan[LM_HEAD.removesuffix(".weight")] = ColwiseParallel(output_layouts=Replicate())
    return plan


def load(
    kind: type[Model],
    folder: str | PathLike[str],
    distribute: Callable[[Model], object],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    **config_overrides: Any,
) -> Model:
    """The model (of class ``kind``) in ``folder``, of which each process reads and holds its part; in eval mode.

    ``distribute`` is called with a model without numbers (on the meta device), and calls ``shard``,
    ``tensor_parallel``, or both. ``dtype``: None keeps the files' own. ``device`` holds the weights: None
    for that of the mesh, "cpu" under FSDP2's ``CPUOffloadPolicy``. Raises ``CheckpointError`` or ``ConfigError``.
    """
    checkpoint = open_checkpoint(folder, **without_neutral("load", config_overrides, LOADING))
    if checkpoint.config.quantization is not None:
        raise InputError(
            f"{folder} is quantised to {checkpoint.config.quantization}, which is not split over processes; load the "
            "checkpoint that it was made from, or load this one by from_pretrained"
        )
    with without_numbers():
        model = kind(checkpoint.config)
    weights = select(checkpoint.tensors, checkpoint.config, model._head)
    if weights.head == "classifier" and SCORE not in weights.tensors:
        raise KeyMismatchError(
            f"{folder} has no {SCORE}, and a new one would differ between processes; make one with from_pretrained and "
            "save_pretrained"
        )
    model.to(floating_dtype(dtype) or weights.dtype)
    distribute(model)
    model.to_empty(device=device or _meshes_device(model) or torch.get_default_device())
    model.tie_weights()
    model.set_attn_implementation(attn_implementation)
    sources = {name.removeprefix("" if hasattr(model, "model") else PREFIX): t for name, t in weights.tensors.items()}
    for name, parameter in model.named_parameters():
        _read(parameter, sources[name])
    model._read_generation_config(checkpoint.folder)
    return model.eval()


@torch.no_grad()
def _read(parameter: Tensor, source: Tensor) -> None:
    """Copy the part of ``source`` that this process holds; other pages of the file are not read."""
    if isinstance(parameter, DTensor):
        [chunk] = parameter.__create_chunk_list__()  # where the part lies: DTensors tell it to torch's checkpoints
        places = [slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        source = source[places[0]][:, places[1]] if len(places) == 2 else source[places[0]]
        parameter = parameter.to_local()
    parameter.copy_(source.detach())


def _meshes_device(model: nn.Module) -> str | None:
    """The kind of device that the processes compute on; ``to_empty`` takes this process's own of it."""
    return next((p.device_mesh.device_type for p in model.parameters() if isinstance(p, DTensor)), None)


def _has(model: nn.Module, name: str) -> bool:
    """Whether the first part of a name is a module of ``model``: only one head has ``lm_head``."""
    return hasattr(model, name.partition(".")[0])

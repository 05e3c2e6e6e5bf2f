"""What every model class inherits: its configuration, where it lives, loading and saving."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from openllama.attention import check_backend
from openllama.checkpoint.adapters import ADAPTER_PREFIX
from openllama.checkpoint.export import export
from openllama.checkpoint.folders import check_destination, finished_folder
from openllama.checkpoint.gather import is_spread, one_writer
from openllama.checkpoint.names import (
    EMBEDDING,
    LM_HEAD,
    PREFIX,
    SCORE,
    Head,
    Weights,
    floating_dtype,
    is_plain,
    select,
    unwrap,
    without_numbers,
)
from openllama.checkpoint.quantize import quantized_weights
from openllama.checkpoint.reader import Checkpoint, aligned, open_checkpoint
from openllama.checkpoint.writer import OURS, write_weights
from openllama.config import OpenLlamaConfig
from openllama.dropin import LOADING, SAVING, without_neutral
from openllama.errors import CheckpointNotFoundError, InputError, listed, warn
from openllama.generation.config import GENERATION_CONFIG_FILE, GenerationConfig, adopt
from openllama.model import Inputs, StableEmbedding
from openllama.quantized import QuantizedEmbedding
from openllama.quantized import quantize as make_quantized
from openllama.quantized.modules import QuantizedMatrix
from openllama.quantized.rounding import to_round
from openllama.surgery import check_resizable, check_special_ids, own_head, resize_vocabulary

Model = TypeVar("Model", bound="PretrainedModel")
Device: TypeAlias = torch.device | str | int
DeviceMap: TypeAlias = Device | Mapping[str, Device]  # a mapping of names of modules, as transformers has it
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
WRAPPED = re.compile(r"lora_|base_layer|modules_to_save|parametrizations|_packed_params|weight_(orig|mask|[gv])$")
SAVERS = ("torch", "accelerate")  # packages whose ``save`` writes what it is given


class PretrainedModel(nn.Module):
    """Base of the decoder and of the heads on it; heads keep the decoder in ``self.model``."""

    config_class: ClassVar[type[OpenLlamaConfig]] = OpenLlamaConfig  # these four are what trainers look for
    base_model_prefix: ClassVar[str] = "model"
    main_input_name: ClassVar[str] = "input_ids"
    supports_gradient_checkpointing: ClassVar[bool] = True

    embedding: StableEmbedding  # this and the next three of the decoder
    gradient_checkpointing: bool
    checkpoint_arguments: dict[str, Any]
    _attn_implementation: str
    _generation_config: GenerationConfig
    _config_ids: dict[str, Any]  # the special ids of the config that the generation config knows of
    _require_grads: RemovableHandle | None = None
    name_or_path: str  # where ``from_pretrained`` found the model

    @property
    def config(self) -> OpenLlamaConfig:
        """The architecture; head and decoder share it. Shapes are fixed, but it may be replaced as a whole."""
        return self._config

    @config.setter
    def config(self, config: OpenLlamaConfig) -> None:
        self._config = config
        if self.base_model is not self:
            self.base_model.config = config

    @property
    def generation_config(self) -> GenerationConfig:
        """The settings of ``generate``, of models that have it; one of transformers may be assigned.

        A special id that is changed in ``config`` is changed here, too, as in transformers 4.31.0.
        """
        for name in SPECIAL_IDS:
            if (now := getattr(self.config, name)) != self._config_ids[name]:
                setattr(self._generation_config, name, now)
                self._config_ids[name] = now
        return self._generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self._generation_config = adopt(config, self.__dict__.get("_generation_config", GenerationConfig()))
        self._config_ids = {name: getattr(self.config, name) for name in SPECIAL_IDS}

    @property
    def base_model(self) -> PretrainedModel:
        """The ``OpenLlamaModel`` without head: this model itself where it has none."""
        return getattr(self, "model", self)  # only the decoder has no "model"

    def get_decoder(self) -> PretrainedModel:
        """HF's other name for ``base_model``."""
        return self.base_model

    @property
    def device(self) -> torch.device:
        parameter = next(self.parameters(), None)
        return torch.get_default_device() if parameter is None else parameter.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Numbers in all weights, shared ones counted once; without those of embedding tables if asked."""
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding) and exclude_embeddings}
        counted = (p for p in self.parameters() if p.requires_grad or not only_trainable)
        rounded = [m for m in self.modules() if isinstance(m, QuantizedMatrix) and not only_trainable]
        if exclude_embeddings:
            rounded = [m for m in rounded if not isinstance(m, QuantizedEmbedding)]
        return sum(p.numel() for p in counted if id(p) not in tables) + sum(m.numel() for m in rounded)

    @property
    def attn_implementation(self) -> str:
        """The attention backend: "eager", "sdpa", "xformers" or one that ``register_backend`` made."""
        return self.base_model._attn_implementation

    def set_attn_implementation(self, name: str | None) -> None:
        """Choose the attention backend, None for the config's; raises ``BackendError`` where it cannot run."""
        default = "sdpa" if self.config.use_memory_efficient_attention else "eager"
        self.base_model._attn_implementation = check_backend(name or default, self.device)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """In training, compute each layer again in the backward pass instead of keeping its inner values.

        ``gradient_checkpointing_kwargs``: arguments of ``torch.utils.checkpoint.checkpoint``, such as
        ``{"context_fn": openllama.recompute.keep_products}``, which keeps what is expensive to compute.
        """
        self.base_model.gradient_checkpointing = True
        self.base_model.checkpoint_arguments = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """``gradient_checkpointing_enable`` by the name that transformers gave it in 5.23; for its ``Trainer``."""
        if every_n_layers != 1 or offload:
            raise InputError(
                f"every layer is computed again and nothing is offloaded, got every_n_layers={every_n_layers} and "
                f"offload={offload}; openllama.recompute.keep_products keeps what is expensive to compute"
            )
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.base_model.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.base_model.gradient_checkpointing

    def enable_input_require_grads(self) -> None:
        """Let gradients flow from the embedding's output although the table is frozen, as adapters need it."""
        self.disable_input_require_grads()
        self._require_grads = self.get_input_embeddings().register_forward_hook(_require_grad)

    def disable_input_require_grads(self) -> None:
        if self._require_grads is not None:
            self._require_grads.remove()
            self._require_grads = None

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding table. With a stable embedding its vectors are not what the layers get: see ``embed``."""
        return self.base_model.embedding.tokens

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, T) -> the vectors (B, T, C) that the layers get, with the norm of a stable embedding.

        ``model(inputs_embeds=model.embed(ids))`` computes what ``model(ids)`` does.
        """
        return self.base_model.embedding(input_ids)

    def set_input_embeddings(self, module: nn.Embedding) -> None:
        """Replace the embedding table by one of the same shape; tied heads follow."""
        self._check_changeable()
        wanted = (self.config.vocab_size, self.config.hidden_size)
        if not isinstance(module, nn.Embedding):
            raise InputError(f"input embeddings must be an nn.Embedding, got {type(module).__name__}")
        if module.weight.shape != wanted:
            raise InputError(
                f"input embeddings must be {wanted}, got {tuple(module.weight.shape)}; see resize_token_embeddings"
            )
        self.base_model.embedding.tokens = module
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Module | None:
        """None: this model has no language-model head."""

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """Give the vocabulary ``new_num_tokens`` rows (None: as many as now), rounded up to a multiple.

        The config follows. Raises ``InputError`` where a special id would lose its row.
        """
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            if not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1:
                raise InputError(f"pad_to_multiple_of must be a positive integer, got {pad_to_multiple_of!r}")
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size == self.config.vocab_size:
            return self.get_input_embeddings()
        self._check_changeable()
        table, head = self.get_input_embeddings(), own_head(self)
        if is_spread(table.weight):
            raise InputError("the embedding table is spread over processes; resize the vocabulary before sharding")
        check_resizable(table, head, size)
        padding = dataclasses.replace(self.config, pad_token_id=self.config.padding_idx)  # a row, counted from 0
        check_special_ids(size, padding, getattr(self, "generation_config", None))
        self.config = resize_vocabulary(table, head, self.config, size)
        self.tie_weights()
        return table

    def _check_changeable(self) -> None:
        """Raise ``InputError`` where the embedding table or the head cannot be another, as they are quantised."""
        if self.config.quantization is not None:
            raise InputError(
                f"the vocabulary of a model that is quantised to {self.config.quantization} does not change; load the "
                "model without quantize, change it, then quantise it (openllama.quantized.quantize)"
            )

    def tie_weights(self) -> None:
        """Share the tensors the config wants shared; only a causal-LM head has any."""

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder: str | PathLike[str],
        dtype: torch.dtype | str | None = None,
        device: Device | None = None,
        attn_implementation: str | None = None,
        *,
        torch_dtype: torch.dtype | str | None = None,
        device_map: DeviceMap | None = None,
        use_safetensors: bool | None = None,
        config: OpenLlamaConfig | str | PathLike[str] | None = None,
        quantize: str | None = None,
        **config_overrides: Any,
    ) -> Model:
        """The model stored in ``folder`` (or a file of weights), HF or native, in eval mode.

        ``dtype`` (alias ``torch_dtype``): None and "auto" keep the files' own. Unless cast, moved or aligned (see
        ``checkpoint.reader.aligned``), weights are pages of the files, read when used; training changes
        private copies, never the files. ``device``: None is torch's default; on "meta" no number is read.
        ``device_map``: another way to name the device, "auto" for the accelerator if there is one.
        ``use_safetensors``: True refuses pickles. ``config_overrides`` replace fields of config.json, ``config`` all
        of it. ``quantize``: "int8" or "int4" rounds the matrices (``openllama.quantized``) while they are read, one at
        a time, so that memory holds little more than the result. Other arguments of transformers are accepted where
        they ask for nothing (see ``dropin.LOADING``).

        A folder of another head serves too: what is left over is warned of, and so is the one weight
        that may be new, a classifier's ``score``. Raises ``CheckpointError``, ``ConfigError`` or ``InputError``.
        """
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise InputError(f"dtype {dtype} and torch_dtype {torch_dtype} are two names of one argument; give one")
        dtype = floating_dtype(torch_dtype if dtype is None else dtype)
        device = _one_device(device, device_map)
        config_overrides = without_neutral("from_pretrained", config_overrides, LOADING)
        with torch.device("cpu"):  # files are read there, whatever torch's default device is
            checkpoint = open_checkpoint(folder, config, **config_overrides)
            _check_format(checkpoint, use_safetensors)
            stored = checkpoint.config.quantization
            quantize = to_round(quantize, stored, checkpoint.path)
            quantization = quantize or stored
            with without_numbers():
                model = cls(dataclasses.replace(checkpoint.config, quantization=None))
            model.set_attn_implementation(attn_implementation)
            weights = select(checkpoint.tensors, checkpoint.config, model._head)
            if device.type == "meta":
                weights = _unread(weights)
            if quantization is not None:
                make_quantized(model.to(dtype or weights.dtype), quantization)
                weights = quantized_weights(weights, quantize)
        model.load_state_dict(model._state(weights, dtype or weights.dtype, device), strict=True, assign=True)
        model.tie_weights()
        model.set_attn_implementation(attn_implementation)  # again, now that the device is known
        model._read_generation_config(checkpoint.folder)
        model.name_or_path = str(folder)  # adapters keep it
        return model.eval()

    def save_pretrained(
        self,
        folder: str | PathLike[str],
        max_shard_size: int | str = "5GB",
        overwrite: bool = True,
        *,
        layout: str = "native",
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        **others: Any,
    ) -> None:
        """Write the model to ``folder``, as safetensors in files of at most ``max_shard_size``.

        ``layout``: "native", "hf" (what transformers 4.31.0 reads) or "llama" (a plain LLaMA), as in
        ``checkpoint.convert``; the tokenizer is not written. A model that is there is replaced once this one
        is whole, other files stay. ``state_dict``: weights to write in place of the model's own, such as those that
        were gathered from several devices; names may have the prefixes of wrappers (``checkpoint.names.WRAPPERS``).
        Only where ``is_main_process`` is a file written. ``save_function``: torch's or accelerate's ``save``; files
        are written by this package all the same.

        Where weights are spread over processes (FSDP2, tensor parallelism), all processes call this: the first
        writes, gathering one weight at a time, and its error is raised in all.

        Raises ``KeyMismatchError`` if the weights are not those of the config,
        ``ConfigError`` if a plain LLaMA computes something else, ``InputError`` for arguments of transformers that
        cannot be honoured (``dropin.SAVING``), ``DestinationExistsError``, or ``OSError`` when the disk is full.
        """
        if unknown := without_neutral("save_pretrained", others, SAVING):
            raise InputError(f"save_pretrained does not know {listed(sorted(unknown))}")
        _check_save_function(save_function)
        is_main_process &= getattr(getattr(save_function, "__self__", None), "is_main_process", True)
        state_dict = self.state_dict() if state_dict is None else unwrap(state_dict)
        if not (is_main_process or any(map(is_spread, state_dict.values()))):
            return
        self._check_savable(state_dict)
        weights = select(state_dict, self.config, self._head)
        with one_writer(weights.tensors) as tensors:
            if tensors is None or not is_main_process:
                return
            check_destination(Path(folder), overwrite)
            exported = export(layout, dataclasses.replace(weights, tensors=tensors), self.config)
            with finished_folder(Path(folder), OURS, overwrite=overwrite) as unfinished:
                exported.write_files(unfinished)
                if hasattr(self, "generation_config"):
                    self.generation_config.save_pretrained(unfinished)
                write_weights(
                    unfinished, exported.tensors, max_shard_size=max_shard_size, file_format=exported.file_format
                )

    def _read_generation_config(self, folder: Path) -> None:
        """Take the settings of generation from a folder that has some, in a model that generates."""
        if hasattr(self, "generation_config") and (folder / GENERATION_CONFIG_FILE).is_file():
            self.generation_config = GenerationConfig.from_pretrained(folder)

    def _check_savable(self, state_dict: Mapping[str, Tensor]) -> None:
        """Raise ``InputError`` for modules in place of the model's own, which a folder cannot hold."""
        if wrapped := [name for name in state_dict if WRAPPED.search(name)]:
            raise InputError(
                f"{len(wrapped)} weights, such as {wrapped[0]}, are of an adapter, a parametrization, pruning or "
                "quantisation; merge or remove it before saving (peft: merge_and_unload), or save the adapter by itself"
            )
        if isinstance(getattr(self, "lm_head", None), nn.Linear) and self.config.shared_input_output_embedding:
            raise InputError(
                "lm_head has been replaced by a matrix of its own, but the config has shared_input_output_embedding; "
                "to keep it, set model.config = dataclasses.replace(model.config, shared_input_output_embedding=False)"
            )

    def _wants_dict(self, input_ids: Tensor | Inputs | None, return_dict: bool | None) -> bool:
        """Whether a forward pass returns an output by names; else a tuple, except to those who gave ``Inputs``."""
        return isinstance(input_ids, Inputs) or (self.config.return_dict if return_dict is None else return_dict)

    @property
    def _head(self) -> Head:
        if self.base_model is self:
            return "body"
        return "classifier" if hasattr(self, "score") else "causal-lm"

    def _state(self, weights: Weights, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """What ``load_state_dict`` wants, strictly: tied weights twice, and a new ``score`` where there is none."""
        state: dict[str, Tensor] = {}
        places: set[int] = set()
        for name, tensor in weights.tensors.items():
            tensor = tensor.to(device, dtype if is_plain(name, tensor.dtype) else tensor.dtype).contiguous()
            if tensor.data_ptr() in places:  # a pickle may store two weights as one; they would train as one
                tensor = tensor.clone()
            places.add(tensor.data_ptr())
            state[name] = tensor
        state = aligned(state)
        if isinstance(getattr(self, "lm_head", None), nn.Linear):
            state.setdefault(LM_HEAD, state[EMBEDDING])
        if weights.head == "classifier" and SCORE not in state:
            warn(f"{SCORE} is new and random: the checkpoint has no classifier; train it")
            shape = (self.config.num_labels, self.config.hidden_size)
            state[SCORE] = torch.empty(shape, dtype=dtype, device=device).normal_(std=self.config.initializer_range)
        return state if self.base_model is not self else {k.removeprefix(PREFIX): t for k, t in state.items()}


def _unread(weights: Weights) -> Weights:
    """The same on the meta device: shapes and types, of which no number is read."""
    tensors = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in weights.tensors.items()
    }
    return dataclasses.replace(weights, tensors=tensors)


def _one_device(device: Device | None, device_map: DeviceMap | None) -> torch.device:
    """The device that two arguments name; raises ``InputError`` where they name several."""
    if device_map is None:
        return torch.get_default_device() if device is None else torch.device(device)
    if device is not None:
        raise InputError(f"give device {device} or device_map {device_map}, not both")
    places = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    if len(set(map(str, places))) != 1 or "disk" in places:
        raise InputError(f"device_map {device_map} is not one device; a model is loaded onto one, such as 'cuda:0'")
    if places[0] in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device(places[0])


def _check_format(checkpoint: Checkpoint, use_safetensors: bool | None) -> None:
    """Raise unless the checkpoint is of the format that was asked for, if one was."""
    if use_safetensors and checkpoint.format != "safetensors":
        raise CheckpointNotFoundError(
            f"{checkpoint.path} has no safetensors, but use_safetensors=True; `openllama convert` writes them"
        )
    if use_safetensors is False and checkpoint.format == "safetensors":
        raise InputError("use_safetensors=False, but safetensors are read first; give the path of the file of weights")


def _check_save_function(function: Callable[..., Any] | None) -> None:
    """Raise ``InputError`` for a function that would write other files than ``torch.save``."""
    if function is not None and (getattr(function, "__module__", None) or "").partition(".")[0] not in SAVERS:
        raise InputError(
            f"save_function {function!r} cannot be used: files are written and compared by this package; "
            "model.state_dict() has the weights for a function of your own"
        )


def _require_grad(module: nn.Module, arguments: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def warn_of_unmatched_adapter(model: nn.Module, keys: Any) -> None:
    """Say which weights of an adapter found no module when peft loaded it, as it ignores them in silence."""
    unmatched = [name for name in keys.unexpected_keys if name.startswith(ADAPTER_PREFIX)]
    if unmatched:
        warn(
            f"{len(unmatched)} weights of an adapter match no module of this model and change nothing, such as "
            f"{unmatched[0]}; `openllama convert` renames adapters that were trained on transformers' model"
        )


def register_with_fsdp(model: nn.Module, method: str) -> bool:
    """Register a method that computes with FSDP2, which gathers weights for those that it knows; False if it does."""
    if not hasattr(model, "unshard") or method in vars(model):
        return False
    from torch.distributed.fsdp import register_fsdp_forward_method

    register_fsdp_forward_method(model, method)
    return True

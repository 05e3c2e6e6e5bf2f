"""The shape of a model: every number the weights depend on, checked once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from openllama.errors import CheckpointNotFoundError, ConfigError

MODEL_TYPE = "open-llama"
CONFIG_FILE = "config.json"
ACTIVATIONS = ("silu", "swish", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "tanh", "sigmoid")
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True, kw_only=True)
class OpenLlamaConfig:
    """Architecture of an Open-Llama model; names and defaults are those of transformers 4.31.0.

    Frozen: ``dataclasses.replace(config, hidden_size=64)`` gives a changed copy. An impossible
    combination raises ``ConfigError``. Device, dtype and attention backend are arguments of the
    model, not part of its configuration.
    """

    model_type: ClassVar[str] = MODEL_TYPE  # adapters look for it

    vocab_size: int = 100000  # V: rows of the embedding table; may exceed the tokenizer's pieces
    hidden_size: int = 4096  # C: width of the residual stream
    intermediate_size: int = 11008  # width inside the MLP
    num_hidden_layers: int = 32
    num_attention_heads: int = 32  # H: each of hidden_size / H dimensions
    hidden_act: str = "silu"  # gate activation of the MLP, one of ACTIVATIONS
    max_position_embeddings: int = 2048  # trained context; dynamic NTK scaling starts beyond it
    initializer_range: float = 0.02  # standard deviation of freshly drawn weights
    rms_norm_eps: float = 1e-6  # of the RMSNorms; the embedding LayerNorm always uses 1e-5
    use_cache: bool = True  # return keys and values unless a call says otherwise
    pad_token_id: int | None = 0  # its embedding row starts at zero and gets no gradient
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2  # one id, or several that each end a text
    tie_word_embeddings: bool = False  # lm_head, where there is one, is the embedding table
    use_memory_efficient_attention: bool = True  # default backend: sdpa, or eager when off
    hidden_dropout_prob: float = 0.1  # on the output of each MLP, in training
    attention_dropout_prob: float = 0.1  # on the attention weights, in training
    use_stable_embedding: bool = True  # LayerNorm after the embedding lookup
    shared_input_output_embedding: bool = True  # no lm_head: logits come from the embedding table
    rope_scaling: dict[str, Any] | None = None  # {"type": "linear" | "dynamic", "factor": > 1}
    num_labels: int = 2  # classes of the sequence classifier
    problem_type: str | None = None  # one of PROBLEM_TYPES; None: inferred from the labels
    output_attentions: bool = False  # these three are defaults of a forward call
    output_hidden_states: bool = False
    return_dict: bool = True
    extra: dict[str, Any] = field(default_factory=dict)  # keys of a config.json we have no use for

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_choices()
        self._check_rope_scaling()

    @property
    def head_dim(self) -> int:
        """D: dimensions of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def padding_idx(self) -> int | None:
        """Row of the embedding table that is padding; a negative id counts from the end."""
        return None if self.pad_token_id is None else self.pad_token_id % self.vocab_size

    def _check_sizes(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "max_position_embeddings", "num_labels")  # fmt: skip
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"hidden_size {self.hidden_size} / num_attention_heads {self.num_attention_heads} gives heads of "
                f"{self.head_dim} dimensions; rotary embedding needs an even number"
            )
        if self.pad_token_id is not None and not isinstance(self.pad_token_id, int):
            raise ConfigError(f"pad_token_id must be an integer or None, got {self.pad_token_id!r}")
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ConfigError(f"pad_token_id {self.pad_token_id} is outside the vocabulary of {self.vocab_size}")

    def _check_choices(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(
                f"hidden_act {self.hidden_act!r} is not supported; choose one of {', '.join(ACTIVATIONS)}"
            )
        if self.problem_type not in PROBLEM_TYPES:
            raise ConfigError(f"problem_type {self.problem_type!r} must be one of {PROBLEM_TYPES}")
        for name in ("hidden_dropout_prob", "attention_dropout_prob"):
            if not _is_number(value := getattr(self, name)) or not 0 <= value <= 1:
                raise ConfigError(f"{name} must be a number in [0, 1], got {value!r}")
        for name in ("initializer_range", "rms_norm_eps"):
            if not _is_number(value := getattr(self, name)) or not 0 <= value < float("inf"):
                raise ConfigError(f"{name} must be a number that is not negative, got {value!r}")
        for f in dataclasses.fields(self):
            if isinstance(f.default, bool) and not isinstance(value := getattr(self, f.name), bool):
                raise ConfigError(f"{f.name} must be true or false, got {value!r}")

    def _check_rope_scaling(self) -> None:
        scaling = self.rope_scaling
        if scaling is None:
            return
        if not isinstance(scaling, Mapping) or set(scaling) != {"type", "factor"}:
            raise ConfigError(f'rope_scaling must be {{"type": ..., "factor": ...}} and nothing else, got {scaling!r}')
        if scaling["type"] not in ("linear", "dynamic"):
            raise ConfigError(f"rope_scaling type must be 'linear' or 'dynamic', got {scaling['type']!r}")
        factor = scaling["factor"]
        if not _is_number(factor) or not 1 < factor < float("inf"):
            raise ConfigError(f"rope_scaling factor must be a number above 1, got {factor!r}")
        if scaling["type"] == "dynamic" and self.head_dim == 2:
            raise ConfigError("dynamic rope_scaling needs heads of more than 2 dimensions")
        object.__setattr__(self, "rope_scaling", {"type": scaling["type"], "factor": float(factor)})

    def to_dict(self) -> dict[str, Any]:
        """Everything, as config.json holds it: unknown keys beside the fields, ``model_type`` among them."""
        values = dataclasses.asdict(self)  # copies what can change
        extra = values.pop("extra")
        if len(extra.get("id2label") or ()) != self.num_labels:  # names of other classes
            extra = {key: value for key, value in extra.items() if key not in ("id2label", "label2id")}
        return {**extra, **values, "model_type": MODEL_TYPE}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> OpenLlamaConfig:
        """Read what ``to_dict`` or transformers wrote; ``overrides`` replace fields by name.

        Unknown keys end in ``extra``; an override that is no field raises ``ConfigError``, and so
        does a ``model_type`` that is neither "open-llama" nor a "llama" of the same architecture.
        """
        values = dict(values)
        model_type = values.pop("model_type", MODEL_TYPE)
        if model_type == "llama":
            values = _from_llama(values)
        elif model_type != MODEL_TYPE:
            raise ConfigError(
                f"model_type {model_type!r} is not supported; this package reads {MODEL_TYPE!r} and 'llama'"
            )
        misspelt = "use_memorry_efficient_attention"  # early checkpoints have it, and HF lets it win
        if misspelt in values:
            values["use_memory_efficient_attention"] = values.pop(misspelt)
        if values.get("id2label"):  # the number of names wins
            values["num_labels"] = len(values["id2label"])
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        if unknown := sorted(set(overrides) - known):
            raise ConfigError(f"{', '.join(unknown)}: not a field of OpenLlamaConfig")
        fields = {k: v for k, v in values.items() if k in known}
        extra = {k: v for k, v in values.items() if k not in known}
        return cls(**{**fields, **overrides}, extra=extra)

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], **overrides: Any) -> OpenLlamaConfig:
        """Read ``config.json`` of a folder (or that file itself)."""
        path = Path(folder)
        path = path / CONFIG_FILE if path.is_dir() else path
        if not path.is_file():
            raise CheckpointNotFoundError(
                f"{path}: no such file; a model folder holds its configuration in {CONFIG_FILE}"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}, not a JSON object")
        try:
            return cls.from_dict(values, **overrides)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write ``config.json`` into ``folder``, making the folder where needed."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False)
        (Path(folder) / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refuse_assignment(self: OpenLlamaConfig, name: str, value: Any) -> None:
    raise dataclasses.FrozenInstanceError(
        f"a config does not change; set model.config = dataclasses.replace(model.config, {name}={value!r}), "
        "or pass the field to from_pretrained"
    )


OpenLlamaConfig.__setattr__ = _refuse_assignment  # type: ignore[method-assign, assignment]


def _from_llama(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of a plain LLaMA as an Open-Llama without stable and shared embedding.

    Refuses what this architecture cannot express: grouped-query attention, biases, another RoPE
    base or scaling, heads of a width of their own.
    """
    values = {"vocab_size": 32000, "pad_token_id": None, **values}
    heads, size = values.get("num_attention_heads", 32), values.get("hidden_size", 4096)
    if not isinstance(heads, int) or not isinstance(size, int) or heads < 1:
        raise ConfigError(f"num_attention_heads {heads!r} and hidden_size {size!r} must be positive integers")
    rope = values.pop("rope_parameters", None) or {}  # transformers 5 keeps all of RoPE here
    same = {
        "num_key_value_heads": (values.pop("num_key_value_heads", None) or heads, heads),
        "head_dim": (values.pop("head_dim", None) or size // heads, size // heads),
        "rope_theta": (values.pop("rope_theta", None) or rope.get("rope_theta", 10000.0), 10000.0),
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "attention_bias": (values.pop("attention_bias", False), False),
        "mlp_bias": (values.pop("mlp_bias", False), False),
    }  # fmt: skip
    for name, (got, needed) in same.items():
        if got != needed:
            raise ConfigError(f"this 'llama' has {name} {got!r}; Open-Llama's architecture needs {needed!r}")
    dropouts = {"hidden_dropout_prob": 0.0, "attention_dropout_prob": values.pop("attention_dropout", 0.0)}
    return {**values, **dropouts, "use_stable_embedding": False, "shared_input_output_embedding": False}

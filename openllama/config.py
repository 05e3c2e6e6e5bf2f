"""The shape of a model: every number the weights depend on, checked once.

Also the way in which both configurations, this one and that of generation, declare their settings: a default, and on
the same line the rule that says what else the setting may be.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from openllama.errors import CheckpointNotFoundError, ConfigError, OpenLlamaError, listed, warn

T = TypeVar("T")
FIELDS = "\nFields:"  # ends the part of a docstring that is written by hand
Rule = Callable[[Any], Any]  # returns a value as it is to be kept; raises ValueError with the words after "must be"

MODEL_TYPE = "open-llama"
NATIVE_TYPE = "openllama-native"  # of folders in native layout: no other program may take them for its own
MISSPELT_TYPES = ("open_llama", "openllama", "OpenLlama")
CONFIG_FILE = "config.json"
MAX_INTEGER = 2**63 - 1  # what torch takes
MAX_NUMBER = sys.float_info.max
MAX_LAYERS = 10**5
MAX_SIZE = 2**28  # of a dimension; the bytes of a matrix are then a number that torch takes, too


# ---- settings and their rules


def setting(default: T, rule: Rule, about: str) -> T:
    """A field of a ``Settings`` class: ``default``, or what ``rule`` lets pass, then and when it is assigned later."""
    return field(default=default, metadata={"rule": rule, "about": about, "assignable": True})


def fixed(default: T, rule: Rule, about: str) -> T:
    """A ``setting`` that cannot be assigned, because modules were built from it."""
    return field(default=default, metadata={"rule": rule, "about": about})


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def integer(least: float = -math.inf, hint: str = "", most: int = MAX_INTEGER) -> Rule:
    """Integers from ``least`` to ``most``; those of numpy become Python's."""

    def rule(value: Any) -> int:
        if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
            raise ValueError(f"an integer{f' of at least {least}' if least > -math.inf else ''}{hint}")
        if abs(int(value)) > most:
            raise ValueError(f"an integer of at most {most}")
        return int(value)

    return rule


def number(interval: str = "(-inf, inf)", hint: str = "") -> Rule:
    """Real numbers in an interval written as in mathematics: "(0, 1]" is 0 < x <= 1."""
    low, high = map(float, interval[1:-1].split(","))
    ends = [low] * (interval[0] == "[") + [high] * (interval[-1] == "]")

    def rule(value: Any) -> Any:
        if isinstance(value, Real) and not isinstance(value, bool):
            value = value if isinstance(value, int) else float(value)  # numpy's own types overflow in comparisons
            if value in ends or (low < value < high and abs(value) <= MAX_NUMBER):
                return value
        raise ValueError(f"a number in {interval}{hint}")

    return rule


def one_of(*choices: Any) -> Rule:
    def rule(value: Any) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):  # 1 is not True
            raise ValueError(f"one of {', '.join(map(repr, choices))}")
        return value

    return rule


def optional(rule: Rule) -> Rule:
    """``rule``, or None."""

    def or_none(value: Any) -> Any:
        return None if value is None else rule(value)

    return or_none


def id_or_ids(value: Any) -> int | list[int]:
    """One token id, or a list of them."""
    try:
        return [integer()(one) for one in value] if isinstance(value, (list, tuple)) else integer()(value)
    except ValueError as error:
        raise ValueError("an id or a list of ids") from error


@dataclass(kw_only=True)
class Settings:
    """Base of the configurations: fields that are checked by their rules, when they are given and when assigned."""

    refusal: ClassVar[type[OpenLlamaError]]  # the error for a value that its rule does not let pass
    held_by: ClassVar[str]  # for the error of an assignment: where the configuration is kept,
    taken_by: ClassVar[str]  # and what takes its fields as arguments

    def __init_subclass__(cls) -> None:
        """``help`` shows what each field is."""
        abouts = {name: f.metadata["about"] for name, f in vars(cls).items() if isinstance(f, dataclasses.Field)}
        rows = (f"    {name}: {about}" for name, about in abouts.items())
        cls.__doc__ = "\n".join((inspect.cleandoc(cls.__doc__ or ""), FIELDS, *rows))

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, rule = getattr(self, f.name), f.metadata.get("rule")
            try:
                self.__dict__[f.name] = value if rule is None else rule(value)
            except ValueError as error:
                raise self.refusal(f"{f.name} must be {error}, got {value!r}") from error

    def __setattr__(self, name: str, value: Any) -> None:
        known = {f.name: f.metadata for f in dataclasses.fields(self)}
        if isinstance(found := getattr(type(self), name, None), property):
            if found.fset is None:
                raise dataclasses.FrozenInstanceError(f"{name} follows from the fields of a config")
            found.fset(self, value)
            return
        if name in (extra := self.__dict__.get("extra", {})):
            extra[name] = value
            return
        if name not in known:
            raise dataclasses.FrozenInstanceError(f"{type(self).__name__} has no field {name}, and none can be added")
        if name in self.__dict__:
            if "assignable" not in known[name]:
                raise dataclasses.FrozenInstanceError(
                    f"{name} of a config does not change; set {self.held_by} = "
                    f"dataclasses.replace({self.held_by}, {name}={value!r}), or pass {name} to {self.taken_by}"
                )
            value = getattr(dataclasses.replace(self, **{name: value}), name)  # checked beside the other fields
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"{name} cannot be deleted from a config")

    @classmethod
    def field_names(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(cls)]


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError("a mapping")
    return dict(value)


EXTRA = {"rule": mapping, "about": "other keys of the file"}  # the field ``extra`` of a ``Settings`` class

# ---- small files, which are read as a whole: no more bytes than a limit, whatever a stranger sends

MAX_JSON = 2**23  # bytes; the index of 10,000 layers has as many, and Python needs up to 60 times as much memory
MAX_DEPTH = 64  # of objects and lists in JSON; copying and printing a value takes a call for each


def read_limited(path: Path, limit: int, refusal: type[OpenLlamaError]) -> bytes:
    """The bytes of a regular file; raises ``refusal`` for anything else, and for a file of more than ``limit`` bytes.

    A folder, a pipe or a device is refused before it is opened, because opening a pipe may wait for ever.
    """
    try:
        if not path.is_file():
            raise refusal(f"{path} is not a regular file")
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        if isinstance(error, OpenLlamaError):
            raise
        raise refusal(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise refusal(f"{path} has {path.stat().st_size:,} bytes; at most {limit:,} are read")
    return content


def read_json(path: Path, refusal: type[OpenLlamaError], unique: bool = False) -> dict[str, Any]:
    """The object that a JSON file holds; raises ``refusal`` for anything else. ``unique``: no key may occur twice."""
    content = read_limited(path, MAX_JSON, refusal)
    try:
        values = json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique_keys if unique else None, parse_constant=refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise refusal(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise refusal(f"{path} holds a {type(values).__name__}, not a JSON object")
    if _depth(values, MAX_DEPTH) > MAX_DEPTH:
        raise refusal(f"{path} nests objects and lists more than {MAX_DEPTH} deep")
    return values


def refuse_lfs_pointer(path: Path, start: bytes, refusal: type[OpenLlamaError]) -> None:
    """Raise ``refusal`` if a file that begins with ``start`` only tells where Git keeps the real one."""
    if start.startswith(b"version https://git-lfs"):
        raise refusal(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull`")


def refuse_constant(name: str) -> None:
    """For ``json.loads(parse_constant=)``: raise ValueError for NaN and the infinities, which Python would accept."""
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = sorted({key for key, _ in pairs if key in seen or seen.add(key)})  # type: ignore[func-returns-value]
        raise ValueError(f"{listed(twice)} given twice")
    return result


def _depth(values: Any, limit: int) -> int:
    """How deep objects and lists nest in ``values``; counts no further than one above ``limit``."""
    depth, level = 0, [values]
    while level and depth <= limit:
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
        level = [inner for inner in level if isinstance(inner, (dict, list))]
        depth += 1
    return depth


def to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write ``values`` to ``path``, making its folder where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(values), encoding="utf-8")


# ---- the model

size = integer(1, most=MAX_SIZE)  # a dimension of a weight


def _gelu_new(x: Tensor) -> Tensor:
    """GELU's tanh approximation (Hendrycks & Gimpel 2016) spelt out: torch's own rounds differently."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # what hidden_act may be, and what it computes
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_new,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
QUANTIZATIONS = ("int8", "int4")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def _rope_scaling(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or set(value) != {"type", "factor"}:
        raise ValueError('{"type": ..., "factor": ...} and nothing else')
    try:
        return {
            "type": one_of("linear", "dynamic")(value["type"]),
            "factor": float(number("(1, inf)")(value["factor"])),
        }
    except ValueError as error:
        raise ValueError('{"type": "linear" or "dynamic", "factor": a number above 1}') from error


@dataclass(kw_only=True)
class OpenLlamaConfig(Settings):
    """Architecture of an Open-Llama model; names and defaults are those of transformers 4.31.0.

    ``dataclasses.replace(config, hidden_size=64)`` gives a changed copy. What a call looks up can be assigned
    (``config.use_cache = False``); what modules were built from cannot. An impossible value or combination raises
    ``ConfigError``. Device, dtype and attention backend are arguments of the model, not part of its configuration.
    Other keys of a config.json are in ``extra``, and can be read as attributes.
    """

    refusal: ClassVar[type[OpenLlamaError]] = ConfigError
    held_by: ClassVar[str] = "model.config"
    taken_by: ClassVar[str] = "from_pretrained"
    model_type: ClassVar[str] = MODEL_TYPE  # adapters look for it
    is_encoder_decoder: ClassVar[bool] = False  # and trainers for this
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]  # trainers do not gather it as a prediction

    vocab_size: int = fixed(100000, size, "V: rows of the embedding table; may exceed the tokenizer's pieces")
    hidden_size: int = fixed(4096, size, "C: width of the residual stream")
    intermediate_size: int = fixed(11008, size, "width inside the MLP")
    num_hidden_layers: int = fixed(32, integer(1, most=MAX_LAYERS), "layers, each of attention and MLP")
    num_attention_heads: int = fixed(32, size, "H: each of hidden_size / H dimensions")
    hidden_act: str = fixed("silu", one_of(*ACTIVATIONS), "gate activation of the MLP")
    max_position_embeddings: int = fixed(2048, integer(1), "trained context; dynamic NTK scaling starts beyond it")
    initializer_range: float = fixed(0.02, number("[0, inf)"), "standard deviation of freshly drawn weights")
    rms_norm_eps: float = fixed(1e-6, number("[0, inf)"), "of the RMSNorms; the embedding LayerNorm uses 1e-5")
    use_cache: bool = setting(True, boolean, "return keys and values unless a call says otherwise")
    pad_token_id: int | None = setting(
        0,
        optional(integer()),
        "its embedding row starts at zero and gets no gradient; assigned later, it only says which tokens are padding",
    )
    bos_token_id: int | None = setting(1, optional(integer()), "begins a text")
    eos_token_id: int | list[int] | None = setting(2, optional(id_or_ids), "ends a text; one id, or several")
    tie_word_embeddings: bool = fixed(False, boolean, "lm_head, if it has a weight, has that of the table")
    use_memory_efficient_attention: bool = fixed(True, boolean, "default backend: sdpa, or eager when off")
    hidden_dropout_prob: float = fixed(0.1, number("[0, 1]"), "on the output of each MLP, in training")
    attention_dropout_prob: float = fixed(0.1, number("[0, 1]"), "on the attention weights, in training")
    use_stable_embedding: bool = fixed(True, boolean, "LayerNorm after the embedding lookup")
    shared_input_output_embedding: bool = fixed(True, boolean, "the embedding table makes the logits, too")
    rope_scaling: dict[str, Any] | None = fixed(None, optional(_rope_scaling), "type and factor")
    num_labels: int = fixed(2, size, "classes of the sequence classifier")
    problem_type: str | None = setting(None, optional(one_of(*PROBLEM_TYPES)), "None: inferred from the labels")
    quantization: str | None = fixed(None, optional(one_of(*QUANTIZATIONS)), "to what matrices are rounded, None: not")
    output_attentions: bool = setting(False, boolean, "return the attention weights unless a call says otherwise")
    output_hidden_states: bool = setting(False, boolean, "return the hidden states unless a call says otherwise")
    return_dict: bool = setting(True, boolean, "return an output with names, not a tuple, unless a call says otherwise")
    extra: dict[str, Any] = field(default_factory=dict, metadata=EXTRA)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"hidden_size {self.hidden_size} / num_attention_heads {self.num_attention_heads} gives heads of "
                f"{self.head_dim} dimensions; rotary embedding needs an even number"
            )
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ConfigError(f"pad_token_id {self.pad_token_id} is outside the vocabulary of {self.vocab_size}")
        if self.rope_scaling is not None and self.rope_scaling["type"] == "dynamic" and self.head_dim == 2:
            raise ConfigError("dynamic rope_scaling needs heads of more than 2 dimensions")

    @property
    def head_dim(self) -> int:
        """D: dimensions of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def padding_idx(self) -> int | None:
        """Row of the embedding table that is padding; a negative id counts from the end."""
        return None if self.pad_token_id is None else self.pad_token_id % self.vocab_size

    @property
    def use_return_dict(self) -> bool:
        """``return_dict`` by the name that peft's classifiers ask for."""
        return self.return_dict

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes: those of config.json if it has as many, else LABEL_0, LABEL_1, ..."""
        names = self.to_dict().get("id2label") or [f"LABEL_{number}" for number in range(self.num_labels)]
        return {
            int(number): name for number, name in (names.items() if isinstance(names, Mapping) else enumerate(names))
        }

    @id2label.setter
    def id2label(self, names: Mapping[int, str] | list[str]) -> None:
        if not isinstance(names, (Mapping, list)) or len(names) != self.num_labels:
            raise ConfigError(f"id2label must name the {self.num_labels} classes of num_labels, got {names!r}")
        self.extra.pop("label2id", None)
        self.extra["id2label"] = names

    @property
    def label2id(self) -> dict[str, int]:
        return {name: number for number, name in self.id2label.items()}

    @label2id.setter
    def label2id(self, numbers: Mapping[str, int]) -> None:
        self.id2label = {number: name for name, number in numbers.items()}

    @property
    def name_or_path(self) -> str:
        """Where the model came from, if its config.json says so."""
        return str(self.extra.get("_name_or_path", ""))

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> OpenLlamaConfig:
        """This configuration, as there is only text."""
        return self

    if not TYPE_CHECKING:  # type checkers shall find misspelt fields

        def __getattr__(self, name: str) -> Any:
            extra = self.__dict__.get("extra", {})
            if name in extra and not name.startswith("__"):
                return extra[name]
            raise AttributeError(f"{type(self).__name__} has no {name}, and neither has its extra")

    def __contains__(self, key: str) -> bool:
        """Whether it is a key of ``to_dict``."""
        return key in self.to_dict()

    def to_json_string(self) -> str:
        """The text of config.json."""
        return to_json(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Everything, as config.json holds it: unknown keys beside the fields, ``model_type`` among them."""
        values = dataclasses.asdict(self)  # copies what can change
        extra = values.pop("extra")
        if len(extra.get("id2label") or ()) != self.num_labels:  # names of other classes
            extra = {key: value for key, value in extra.items() if key not in ("id2label", "label2id")}
        if self.quantization is None:
            del values["quantization"]  # transformers has no such key
        return {"model_type": MODEL_TYPE, **extra, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> OpenLlamaConfig:
        """Read what ``to_dict`` or transformers wrote; ``overrides`` replace fields by name.

        Unknown keys end in ``extra``; an override that is no field raises ``ConfigError``, and so
        does a ``model_type`` other than "open-llama", "openllama-native" or a "llama" of the same architecture.
        """
        values = dict(values)
        values |= {name: overrides.pop(name) for name in ("id2label", "label2id") if name in overrides}
        model_type = values.pop("model_type", MODEL_TYPE)
        if model_type == "llama":
            values = _from_llama(values)
        elif model_type not in (MODEL_TYPE, NATIVE_TYPE):
            hint = f"; write it as {MODEL_TYPE!r}" if model_type in MISSPELT_TYPES else ""
            raise ConfigError(
                f"model_type {model_type!r} is not supported{hint}; "
                f"this package reads {MODEL_TYPE!r}, {NATIVE_TYPE!r} and 'llama'"
            )
        misspelt = "use_memorry_efficient_attention"  # early checkpoints have it, and HF lets it win
        if misspelt in values:
            values["use_memory_efficient_attention"] = values.pop(misspelt)
        if labels := values.get("id2label"):  # the number of names wins
            if not isinstance(labels, (Mapping, list)):
                raise ConfigError(f"id2label must be the names of the classes by number, got {labels!r}")
            values["num_labels"] = len(labels)
        known = set(cls.field_names()) - {"extra"}
        if unknown := sorted(set(overrides) - known):
            raise ConfigError(f"{', '.join(unknown)}: not a field of OpenLlamaConfig")
        fields = {k: v for k, v in values.items() if k in known}
        extra = {k: v for k, v in values.items() if k not in known}
        longest = max(map(len, known))
        for key in [key for key in extra if len(key) <= 2 * longest][:100]:
            if similar := [name for name in get_close_matches(key, known, 1, 0.85) if name not in fields]:
                warn(f"{key} is not a field of the configuration, and {similar[0]} has its default: is it misspelt?")
        return cls(**{**fields, **overrides}, extra=extra)

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], **overrides: Any) -> OpenLlamaConfig:
        """Read ``config.json`` of a folder (or that file itself)."""
        path = Path(folder).expanduser()
        path = path / CONFIG_FILE if path.is_dir() else path
        if not path.is_file():
            raise CheckpointNotFoundError(
                f"{path}: no such file; a model folder holds its configuration in {CONFIG_FILE}"
            )
        values = read_json(path, ConfigError)
        try:
            return cls.from_dict(values, **overrides)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write ``config.json`` into ``folder``, making the folder where needed."""
        write_json(Path(folder) / CONFIG_FILE, self.to_dict())


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
    if not isinstance(rope, Mapping):
        raise ConfigError(f"rope_parameters must be a mapping, got {rope!r}")
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

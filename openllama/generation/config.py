"""How to generate: the settings of ``generate``, what each may be, and its file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

from openllama.config import OpenLlamaConfig
from openllama.errors import ConfigError, InputError

GENERATION_CONFIG_FILE = "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of ``generate``, with the names and defaults of transformers 4.31.0.

    Each can be given to ``generate`` by name and then wins over the model's own. Raises
    ``InputError`` for a value that cannot be meant; which settings go together is checked when they
    are used.
    """

    # length
    max_length: int = 20  # tokens of prompt and continuation together
    max_new_tokens: int | None = None  # tokens of the continuation; wins over max_length
    min_length: int | None = 0  # no end before this many tokens of prompt and continuation
    min_new_tokens: int | None = None  # no end before this many tokens of continuation
    max_time: float | None = None  # seconds after which no further token is begun

    # strategy
    do_sample: bool = False  # draw from the distribution; else take the most likely token
    num_beams: int = 1  # texts followed at a time by beam search; 1: no beam search
    num_beam_groups: int = 1  # groups of beams that shun each other's tokens
    diversity_penalty: float | None = 0.0  # what a token costs per earlier group's beam that chose it
    early_stopping: bool | str = False  # beams: True: at num_beams finished texts; "never": when none can improve
    length_penalty: float = 1.0  # beams: score / length ** this; above 0 favours long texts
    penalty_alpha: float | None = None  # contrastive search among top_k tokens, weight of the penalty
    prompt_lookup_num_tokens: int | None = None  # guess this many tokens ahead from the text so far
    max_matching_ngram_size: int = 2  # prompt lookup: tokens that must recur for a guess, at most
    use_cache: bool = True  # off: compute the whole text anew for each token
    num_return_sequences: int = 1  # continuations of each prompt

    # which tokens sampling may draw
    temperature: float | None = 1.0  # below 1 sharpens the distribution, above 1 flattens it
    top_k: int | None = 50  # draw among the k most likely tokens; 0 or None: all
    top_p: float | None = 1.0  # draw among the likeliest tokens that together reach probability p
    min_p: float | None = None  # drop tokens less likely than this share of the likeliest
    typical_p: float | None = 1.0  # draw among the tokens of most expected surprise that reach probability p
    epsilon_cutoff: float | None = 0.0  # drop tokens less likely than this
    eta_cutoff: float | None = 0.0  # the same, with a lower bar where the distribution is flat

    # scores of tokens
    repetition_penalty: float | None = 1.0  # above 1 makes tokens of the text so far less likely
    no_repeat_ngram_size: int | None = 0  # no sequence of this many tokens comes twice
    bad_words_ids: list[list[int]] | None = None  # sequences that never come
    sequence_bias: Mapping[tuple[int, ...], float] | None = None  # added to the token that completes a sequence
    suppress_tokens: list[int] | None = None  # never come
    begin_suppress_tokens: list[int] | None = None  # do not come first
    forced_bos_token_id: int | None = None  # follows a prompt of one token
    forced_eos_token_id: int | list[int] | None = None  # is the last token when max_length is reached
    exponential_decay_length_penalty: tuple[int, float] | None = None  # (new tokens to wait, factor per token)
    remove_invalid_values: bool = False  # NaN scores become 0, infinite ones the largest number
    renormalize_logits: bool = False  # end with log-probabilities

    # what is returned
    return_dict_in_generate: bool = False  # a GenerateOutput instead of ids
    output_scores: bool = False  # with the scores each token was picked by
    output_logits: bool = False  # with the model's own logits
    output_attentions: bool = False
    output_hidden_states: bool = False

    # special tokens
    pad_token_id: int | None = None  # follows a text that has ended before its batch has
    bos_token_id: int | None = None  # begins a text where no prompt is given
    eos_token_id: int | list[int] | None = None  # each ends a text
    extra: dict[str, Any] = field(default_factory=dict)  # keys of a generation_config.json not listed above

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), str(f.type).removesuffix(" | None")
            if kind in KINDS and not (value is None and f.name in OPTIONAL) and not KINDS[kind][0](value):
                raise InputError(f"{f.name} must be {KINDS[kind][1]}, got {value!r}")
        for names, allowed, rule in RULES:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not allowed(value):
                    raise InputError(f"{name} must {rule}, got {value!r}")
        if self.early_stopping not in (True, False, "never"):
            raise InputError(f'early_stopping must be True, False or "never", got {self.early_stopping!r}')
        if self.sequence_bias is not None:
            object.__setattr__(self, "sequence_bias", _as_bias(self.sequence_bias))
        if self.exponential_decay_length_penalty is not None:
            object.__setattr__(self, "exponential_decay_length_penalty", tuple(self.exponential_decay_length_penalty))

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end a text: none, one or several."""
        return as_list(self.eos_token_id)

    @property
    def padding_id(self) -> int:
        """What follows a text that has ended: the padding id, else the first that ends a text."""
        return self.pad_token_id if self.pad_token_id is not None else (self.eos_token_ids or [0])[0]

    def replace(self, **options: Any) -> GenerationConfig:
        """A copy with the given fields changed; a name that is no field raises ``InputError``."""
        known = {f.name for f in dataclasses.fields(self)} - {"extra"}
        if unknown := sorted(set(options) - known):
            raise InputError(
                f"generate does not know {', '.join(unknown)}; its settings are {', '.join(sorted(known))}"
            )
        return dataclasses.replace(self, **options)

    @classmethod
    def from_model_config(cls, config: OpenLlamaConfig) -> GenerationConfig:
        """The settings of a model that comes without a generation_config.json."""
        return cls(pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationConfig:
        """Read what ``to_dict`` or transformers wrote; keys that are no field are kept in ``extra``.

        None stands for the default where it is no value.
        """
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        extra = {key: value for key, value in values.items() if key not in known}
        given = {key: value for key, value in values.items() if key in known}
        return cls(**{k: v for k, v in given.items() if v is not None or k in OPTIONAL}, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON has them: ``sequence_bias`` becomes a list of [ids, bias]."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        if self.sequence_bias is not None:
            values["sequence_bias"] = [[list(ids), bias] for ids, bias in self.sequence_bias.items()]
        return {**self.extra, **values}

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str]) -> GenerationConfig:
        """Read ``generation_config.json`` of a folder."""
        path = Path(folder) / GENERATION_CONFIG_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError(f"a JSON object is needed, this is a {type(values).__name__}")
            return cls.from_dict(values)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write ``generation_config.json`` into ``folder``."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True)
        (Path(folder) / GENERATION_CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


#: fields that None switches off
OPTIONAL = {
    name for name, f in GenerationConfig.__dataclass_fields__.items() if isinstance(f.type, str) and "None" in f.type
}


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _are_whole(values: object) -> bool:
    return isinstance(values, (list, tuple)) and all(map(_is_whole, values))


#: type of a field: (whether a value has it, the type in words)
KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (lambda v: isinstance(v, bool), "True or False"),
    "int": (_is_whole, "a whole number"),
    "float": (_is_number, "a number"),
    "int | list[int]": (lambda v: _is_whole(v) or _are_whole(v), "an id or a list of ids"),
    "list[int]": (_are_whole, "a list of ids"),
    "list[list[int]]": (lambda v: isinstance(v, (list, tuple)) and all(map(_are_whole, v)), "a list of lists of ids"),
    "tuple[int, float]": (
        lambda v: isinstance(v, (list, tuple)) and len(v) == 2 and _is_whole(v[0]) and _is_number(v[1]),
        "a pair (tokens to wait, factor)",
    ),
}

#: (fields, what a value must satisfy, the same in words)
RULES: Sequence[tuple[str, Callable[[Any], bool], str]] = (
    ("temperature", lambda v: v > 0, "be above 0 (for the likeliest token use do_sample=False)"),
    ("top_k", lambda v: v >= 0, "not be negative (0 switches it off)"),
    ("top_p typical_p", lambda v: 0 < v <= 1, "lie in (0, 1] (1.0 switches it off)"),
    ("min_p", lambda v: 0 <= v <= 1, "lie in [0, 1] (None switches it off)"),
    ("epsilon_cutoff eta_cutoff", lambda v: 0 <= v < 1, "lie in [0, 1) (0.0 switches it off)"),
    ("repetition_penalty", lambda v: 0 < v < math.inf, "be above 0 (1.0 switches it off)"),
    ("penalty_alpha", lambda v: 0 <= v <= 1, "lie in [0, 1] (None switches contrastive search off)"),
    ("diversity_penalty", lambda v: 0 <= v < math.inf, "not be negative (0.0 switches it off)"),
    ("length_penalty", math.isfinite, "be a finite number (0.0 switches it off)"),
    ("max_time", lambda v: v > 0, "be above 0 seconds (None: no limit)"),
    ("min_length min_new_tokens no_repeat_ngram_size", lambda v: v >= 0, "not be negative"),
    (
        "max_length max_new_tokens num_beams num_beam_groups num_return_sequences prompt_lookup_num_tokens "
        "max_matching_ngram_size",
        lambda v: v >= 1,
        "be at least 1",
    ),
)


def as_list(ids: int | Sequence[int] | None) -> list[int]:
    """None -> [], 2 -> [2], [2, 3] -> [2, 3]."""
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def _as_bias(bias: Mapping[tuple[int, ...], float] | Sequence[Any]) -> dict[tuple[int, ...], float]:
    """{(ids): bias} from a mapping, or from the pairs that a file holds."""
    try:
        pairs = bias.items() if isinstance(bias, Mapping) else [(ids, value) for ids, value in bias]
        result = {tuple(ids): float(value) for ids, value in pairs}
    except (TypeError, ValueError) as error:
        raise InputError(f"sequence_bias must map tuples of ids to numbers, got {bias!r}") from error
    if () in result or not all(map(_are_whole, result)) or any(map(math.isnan, result.values())):
        raise InputError(f"sequence_bias must map sequences of at least one id to numbers, got {bias!r}")
    return result

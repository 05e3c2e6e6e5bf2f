"""The settings of ``generate``: on each line a default and the rule for other values; and their file."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

from openllama.config import (
    EXTRA,
    OpenLlamaConfig,
    Settings,
    boolean,
    id_or_ids,
    integer,
    number,
    one_of,
    optional,
    read_json,
    setting,
    write_json,
)
from openllama.dropin import GENERATING, without_neutral
from openllama.errors import ConfigError, InputError, OpenLlamaError, warn

GENERATION_CONFIG_FILE = "generation_config.json"


def token_ids(value: Any) -> list[int]:
    if not isinstance(value, (list, tuple)):
        raise ValueError("a list of ids")
    return [integer()(token) for token in value]


def id_lists(value: Any) -> list[list[int]]:
    if isinstance(value, (list, tuple)) and all(value):
        with contextlib.suppress(ValueError):
            return [token_ids(ids) for ids in value]
    raise ValueError("a list of lists of at least one id")


def bias(value: Any) -> dict[tuple[int, ...], float]:
    """{(ids): bias} from a mapping, or from the pairs that a file holds."""
    try:
        pairs = value.items() if isinstance(value, Mapping) else [(ids, amount) for ids, amount in value]
        result = {tuple(token_ids(ids)): float(number("[-inf, inf]")(amount)) for ids, amount in pairs}
    except (TypeError, ValueError) as error:
        raise ValueError("a mapping from tuples of ids to numbers") from error
    if () in result:
        raise ValueError("a mapping from tuples of at least one id to numbers")
    return result


def wait_and_factor(value: Any) -> tuple[int, float]:
    try:
        wait, factor = value
        return integer()(wait), number()(factor)
    except (TypeError, ValueError) as error:
        raise ValueError("a pair (tokens to wait, factor)") from error


def off(value: str) -> str:
    return f" ({value} switches it off)"


NOT_ZERO = " (for the likeliest token use do_sample=False)"


@dataclass(kw_only=True)
class GenerationConfig(Settings):
    """Settings of ``generate``, with the names and defaults of transformers 4.31.0.

    Each can be given to ``generate`` by name and then replaces the model's own. An impossible value raises
    ``InputError``; ``generate`` checks which settings can be combined.
    """

    refusal: ClassVar[type[OpenLlamaError]] = InputError
    held_by: ClassVar[str] = "model.generation_config"
    taken_by: ClassVar[str] = "generate"

    # -- length --
    max_length: int = setting(20, integer(1), "tokens of prompt and continuation together")
    max_new_tokens: int | None = setting(None, optional(integer(1)), "tokens of the continuation; replaces max_length")
    min_length: int | None = setting(0, optional(integer(0)), "eos is not generated before; counts the prompt")
    min_new_tokens: int | None = setting(None, optional(integer(0)), "the same, not counting the prompt")
    max_time: float | None = setting(
        None, optional(number("(0, inf]", off("None"))), "seconds, after which no further token is started"
    )

    # -- strategy --
    do_sample: bool = setting(False, boolean, "draw from the distribution; else take the likeliest token")
    num_beams: int = setting(1, integer(1), "sequences that beam search follows at a time; 1: no beam search")
    num_beam_groups: int = setting(1, integer(1), "groups of beams that avoid each other's tokens")
    diversity_penalty: float | None = setting(
        0.0,
        optional(number("[0, inf)", off("0.0"))),
        "subtracted from a token's score for each beam of an earlier group that has taken the token",
    )
    early_stopping: bool | Literal["never"] = setting(
        False,
        one_of(True, False, "never"),
        "when beam search stops, once num_beams sequences have ended: True: at once; False: when no running beam has a "
        "better score now; 'never': when no running beam can reach a better score",
    )
    length_penalty: float = setting(
        1.0,
        number(hint=off("0.0")),
        "beams are ranked by score / length ** length_penalty: above 0 favours long sequences",
    )
    penalty_alpha: float | None = setting(None, optional(number("[0, 1]", off("None"))), "turns on contrastive search")
    prompt_lookup_num_tokens: int | None = setting(None, optional(integer(1)), "tokens to guess from the text so far")
    max_matching_ngram_size: int = setting(2, integer(1), "prompt lookup: longest n-gram that is searched for")
    use_cache: bool = setting(True, boolean, "False: compute the whole sequence again for each token")
    num_return_sequences: int = setting(1, integer(1), "continuations of each prompt")

    # -- sampling filters --
    temperature: float | None = setting(
        1.0,
        optional(number("(0, inf)", NOT_ZERO)),
        "logits are divided by the temperature: below 1 sharpens the distribution, above 1 flattens it",
    )
    top_k: int | None = setting(50, optional(integer(0, off("0"))), "keep the k likeliest tokens")
    top_p: float | None = setting(
        1.0, optional(number("(0, 1]", off("1.0"))), "keep the likeliest tokens whose probabilities sum to top_p"
    )
    min_p: float | None = setting(
        None, optional(number("[0, 1]", off("None"))), "keep tokens at least min_p times as likely as the likeliest"
    )
    typical_p: float | None = setting(
        1.0,
        optional(number("(0, 1]", off("1.0"))),
        "keep the tokens whose surprise is nearest the expected one and whose probabilities sum to typical_p",
    )
    epsilon_cutoff: float | None = setting(
        0.0, optional(number("[0, 1)", off("0.0"))), "keep tokens at least this likely"
    )
    eta_cutoff: float | None = setting(
        0.0,
        optional(number("[0, 1)", off("0.0"))),
        "like epsilon_cutoff, with a lower bar where the distribution is flat",
    )

    # -- scores of tokens --
    repetition_penalty: float | None = setting(
        1.0, optional(number("(0, inf)", off("1.0"))), "above 1 makes tokens of the sequence so far less likely"
    )
    no_repeat_ngram_size: int | None = setting(0, optional(integer(0, off("0"))), "no n-gram of this size comes twice")
    bad_words_ids: list[list[int]] | None = setting(None, optional(id_lists), "sequences that are never generated")
    sequence_bias: Mapping[tuple[int, ...], float] | None = setting(
        None, optional(bias), "added to the score of the token that would complete a sequence"
    )
    suppress_tokens: list[int] | None = setting(None, optional(token_ids), "tokens that are never generated")
    begin_suppress_tokens: list[int] | None = setting(None, optional(token_ids), "tokens that are not generated first")
    forced_bos_token_id: int | None = setting(None, optional(integer()), "the token after a prompt of one token")
    forced_eos_token_id: int | list[int] | None = setting(
        None, optional(id_or_ids), "the last token of a sequence that reaches max_length"
    )
    exponential_decay_length_penalty: tuple[int, float] | None = setting(
        None, optional(wait_and_factor), "(new tokens to wait, factor per token) for the score of the eos token"
    )
    remove_invalid_values: bool = setting(False, boolean, "NaN becomes 0, infinity the largest number")
    renormalize_logits: bool = setting(False, boolean, "end with log-probabilities")

    # -- output --
    return_dict_in_generate: bool = setting(False, boolean, "a GenerateOutput instead of ids")
    output_scores: bool = setting(False, boolean, "with the scores each token was picked by")
    output_logits: bool = setting(False, boolean, "with the model's own logits")
    output_attentions: bool = setting(False, boolean, "with the attention weights of each forward pass")
    output_hidden_states: bool = setting(False, boolean, "with the hidden states of each forward pass")

    # -- special tokens --
    pad_token_id: int | None = setting(None, optional(integer()), "follows a sequence that ends before its batch does")
    bos_token_id: int | None = setting(None, optional(integer()), "begins a sequence where no prompt is given")
    eos_token_id: int | list[int] | None = setting(None, optional(id_or_ids), "each ends a sequence")
    extra: dict[str, Any] = field(default_factory=dict, metadata=EXTRA)

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end a sequence: none, one or several."""
        return as_list(self.eos_token_id)

    @property
    def padding_id(self) -> int:
        """What follows a sequence that has ended: the padding id, else the first that ends one."""
        return self.pad_token_id if self.pad_token_id is not None else (self.eos_token_ids or [0])[0]

    def replace(self, **options: Any) -> GenerationConfig:
        """A copy with the given fields changed; a name that is no field raises ``InputError``."""
        known = set(self.field_names()) - {"extra"}
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
        rules = {f.name: f.metadata["rule"] for f in dataclasses.fields(cls) if f.name != "extra"}
        extra = {key: value for key, value in values.items() if key not in rules}
        given = {key: value for key, value in values.items() if key in rules}
        return cls(**{k: v for k, v in given.items() if v is not None or _allows_none(rules[k])}, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON has them: ``sequence_bias`` becomes a list of [ids, bias]."""
        values = {name: getattr(self, name) for name in self.field_names() if name != "extra"}
        if self.sequence_bias is not None:
            values["sequence_bias"] = [[list(ids), amount] for ids, amount in self.sequence_bias.items()]
        return {**self.extra, **values}

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str]) -> GenerationConfig:
        """Read ``generation_config.json`` of a folder."""
        path = Path(folder) / GENERATION_CONFIG_FILE
        values = read_json(path, ConfigError)
        try:
            config = cls.from_dict(values)
        except InputError as error:
            raise ConfigError(f"{path}: {error}") from error
        try:
            without_neutral("generate", config.extra, GENERATING)
        except InputError as error:
            warn(f"{path} asks for what is not done: {error}")
        return config

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write ``generation_config.json`` into ``folder``."""
        write_json(Path(folder) / GENERATION_CONFIG_FILE, self.to_dict())


def adopt(config: Any, own: GenerationConfig) -> GenerationConfig:
    """``config``, which may be a ``GenerationConfig`` of transformers, whose values are taken over.

    What is the default there is the default here. In transformers 5 and later, where the default is None, that means
    "as the model has it", so that these are taken from ``own``. Raises ``InputError`` for a value of another kind, and
    for settings that there are not here, unless they ask for nothing.
    """
    if isinstance(config, GenerationConfig):
        return config
    if not callable(getattr(config, "to_dict", None)):
        raise InputError(f"generation_config must be a GenerationConfig; a mapping goes in by **, got {config!r:.100}")
    defaults = type(config)().to_dict()
    given = {name: value for name, value in config.to_dict().items() if defaults.get(name) != value}
    given = {name: value for name, value in given.items() if name != "transformers_version" and name[:1] != "_"}
    base = own if defaults.get("max_length") is None else GenerationConfig()
    return base.replace(**without_neutral("generate", given, GENERATING))


def as_list(ids: int | Sequence[int] | None) -> list[int]:
    """None -> [], 2 -> [2], [2, 3] -> [2, 3]."""
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def _allows_none(rule: Any) -> bool:
    try:
        rule(None)
    except ValueError:
        return False
    return True

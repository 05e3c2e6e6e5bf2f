"""How to generate: lengths, special ids, and how a token is drawn."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    ``InputError`` for a value that cannot be meant.
    """

    max_length: int = 20  # tokens of prompt and continuation together
    max_new_tokens: int | None = None  # tokens of the continuation; wins over max_length
    do_sample: bool = False  # draw from the distribution; else take the most likely token
    temperature: float = 1.0  # below 1 sharpens the distribution, above 1 flattens it
    top_k: int | None = 50  # draw among the k most likely tokens; 0 or None: all
    top_p: float | None = 1.0  # draw among the likeliest tokens that together reach probability p
    use_cache: bool = True  # off: compute the whole text anew for each token
    pad_token_id: int | None = None  # follows a text that has ended before its batch has
    bos_token_id: int | None = None  # begins a text where no prompt is given
    eos_token_id: int | list[int] | None = None  # each ends a text
    extra: dict[str, Any] = field(default_factory=dict)  # keys of a generation_config.json not listed above

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(
                f"temperature must be above 0, got {self.temperature}; for the likeliest token use do_sample=False"
            )
        if self.top_k is not None and self.top_k < 0:
            raise InputError(f"top_k must not be negative, got {self.top_k}; 0 switches it off")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must lie in (0, 1], got {self.top_p}; 1.0 switches it off")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end a text: none, one or several."""
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else list(self.eos_token_id)

    def replace(self, **options: Any) -> GenerationConfig:
        """A copy with the given fields changed; a name that is no field raises ``InputError``."""
        known = {f.name for f in dataclasses.fields(self)}
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
        """Read what ``to_dict`` or transformers wrote; keys that are no field are kept in ``extra``."""
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        extra = {key: value for key, value in values.items() if key not in known}
        return cls(**{key: value for key, value in values.items() if key in known}, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        return {**self.extra, **values}

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str]) -> GenerationConfig:
        """Read ``generation_config.json`` of a folder."""
        path = Path(folder) / GENERATION_CONFIG_FILE
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write ``generation_config.json`` into ``folder``."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True)
        (Path(folder) / GENERATION_CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

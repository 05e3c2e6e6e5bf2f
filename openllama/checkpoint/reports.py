"""What is wrong with a source without being an error of its weights: it is said when it is converted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from torch import Tensor

from openllama.checkpoint.pieces import count_nonfinite
from openllama.errors import TokenizerError, warn
from openllama.tokenizer import OpenLlamaTokenizer

TOKENIZER_MODEL, TOKENIZER_JSON = "tokenizer.model", "tokenizer.json"


class Nonfinite:
    """Counts numbers that are NaN or infinite, by weight."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def look(self, name: str, piece: Tensor) -> None:
        if count := count_nonfinite(piece):
            self.found[name] += count

    def warn(self) -> None:
        """Name the weights, if there are any."""
        if self.found:
            names = [f"{name} ({count:,})" for name, count in self.found.items()]
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            warn(f"the source holds NaN or infinity, and so does the result: {', '.join(names[:10])}{more}")


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Load the tokenizer of ``folder``, if it has one, before it is copied.

    Raises ``TokenizerError`` if it is broken. A ``tokenizer.json`` alone, and more tokens than the model
    has rows, are warned of.
    """
    if not (folder / TOKENIZER_MODEL).exists():
        if (folder / TOKENIZER_JSON).exists():
            warn(
                f"{folder} has {TOKENIZER_JSON} but no {TOKENIZER_MODEL}: the result has no tokenizer; add the "
                "sentencepiece model that it was made from"
            )
        return
    try:
        size = len(OpenLlamaTokenizer.from_pretrained(folder))
    except TokenizerError as error:
        raise TokenizerError(f"{error}; copy or download the tokenizer again, or remove its files") from error
    if size > vocab_size:
        warn(f"the tokenizer of {folder} has {size} tokens, the model only {vocab_size} rows for them")

"""Every file of the corpus ends in an error of the package or in success: in time, in memory, and no code runs."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from openllama import OpenLlamaTokenizer
from openllama.checkpoint import verify
from openllama.errors import OpenLlamaError, TokenizerError
from tests.attacks import attacks, good_folder
from tests.hostile import corpus

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs pipes, files with holes and /proc")


@pytest.fixture(scope="module", autouse=True)
def _room() -> Iterator[None]:
    """The corpus takes 120 MB, which no later test needs."""
    yield
    corpus.cache_clear()


def found_wrong(names: list[str], folder: Path) -> dict[str, list[str]]:
    cases = corpus()
    return {name: wrong for name, _, wrong in attacks({name: cases[name] for name in names}, folder) if wrong}


def test_the_corpus(tmp_path: Path) -> None:
    """Of the hundreds of cases with one odd field, one in forty is run; `make fuzz` runs all."""
    fields = [name for name in corpus() if " is " in name]
    names = [name for name in corpus() if " is " not in name] + fields[::40]
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # so that memory is measured of this alone
        assert pool.apply(found_wrong, (names, tmp_path)) == {}


@pytest.mark.parametrize("start", ["pytorch_model.bin:", "model.safetensors:", "config.json: lists"])
def test_weights_and_descriptions_of_the_corpus_are_refused(tmp_path: Path, start: str) -> None:
    for name, case in corpus().items():
        if name.startswith(start):
            folder = good_folder(tmp_path / "checkpoint")
            case(folder)
            with pytest.raises((OpenLlamaError, OSError)):
                verify(folder)
            for path in folder.iterdir():
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_a_tokenizer_without_a_piece_for_unknown_text(tmp_path: Path) -> None:
    folder = good_folder(tmp_path)
    corpus()["tokenizer.model: no piece for unknown text"](folder)
    with pytest.raises(TokenizerError, match="has 4599 pieces and none for unknown text"):
        OpenLlamaTokenizer.from_pretrained(folder)

"""Every file of the corpus ends in an error of the package or in success: in time, in memory, and no code runs."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import pytest

from openllama import OpenLlamaTokenizer
from openllama.errors import TokenizerError
from tests.attacks import ENTRIES, attacks, good_folder
from tests.hostile import corpus, without_unk

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs pipes, files with holes and /proc")


PART = 4  # of very many things, with as much less time and memory; `make fuzz` takes all
REFUSED = ("pytorch_model.bin:", "model.safetensors:", "config.json: lists")  # by whatever reads the weights
OTHERS = {name: entry for name, entry in ENTRIES.items() if name not in ("config", "open")}  # they begin with these


def found(folder: Path) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """What went wrong in which case; the cases that should be refused; those of them that were."""
    cases = corpus(PART)
    fields = [name for name in cases if " is " in name]
    names = [name for name in cases if " is " not in name] + fields[::40]
    wrongs, verified = {}, []
    for name, refused, wrong in attacks({name: cases[name] for name in names}, folder, OTHERS, PART):
        if wrong:
            wrongs[name] = wrong
        if any(error.startswith("verify: ") for error in refused):
            verified.append(name)
    broken = [name for name in names if name.startswith(REFUSED)]
    return wrongs, broken, [name for name in verified if name in broken]


def test_the_corpus_ends_in_time_and_memory_and_its_weights_and_descriptions_are_refused(tmp_path: Path) -> None:
    """Of the hundreds of cases with one odd field, one in forty is run; `make fuzz` runs all."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # so that memory is measured of this alone
        wrong, broken, refused = pool.apply(found, (tmp_path,))
    assert wrong == {}
    assert all(any(name.startswith(start) for name in broken) for start in REFUSED)
    assert refused == broken


def test_a_tokenizer_without_a_piece_for_unknown_text(tmp_path: Path) -> None:
    folder = good_folder(tmp_path)
    without_unk(folder)
    with pytest.raises(TokenizerError, match="has 4599 pieces and none for unknown text"):
        OpenLlamaTokenizer.from_pretrained(folder)

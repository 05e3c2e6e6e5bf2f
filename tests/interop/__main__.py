"""``make interop``: exports a model, runs it in every program and compares.

For the shipped model, and for a random one of the shape of the published model of 880 million parameters, the greedy
continuations of ours, transformers 4.31.0 (``--to hf``), current transformers (``--to llama``) and llama.cpp (``--to
gguf``, float32) must be equal, and the logits within ``BARS`` of ours. The ids of every line of the corpora must be
equal for each tokenizer; llama.cpp gets them normalised where the tokenizer does that. Current transformers' Trainer
and current peft train tiny models of ours. Prints tables; ends with exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM, OpenLlamaTokenizer
from openllama.chat import ChatTemplate
from openllama.checkpoint import convert
from openllama.tokenizer.modelfile import parse_model_file
from tests.interop import peer
from tests.oracle import transformers
from tests.parity.draws import randomise_norms
from tests.sentencepieces import CORPORA, TINY_CHECKPOINT, corpus, model_bytes, write_folder

PEER = Path(peer.__file__)
ROOT = PEER.parents[2]
PUBLISHED = OpenLlamaConfig(hidden_size=2048, num_hidden_layers=8, pad_token_id=3)  # 880 million parameters
SMALL = OpenLlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
PROMPTS = ("KING RICHARD II:", "ROMEO:\nO, she doth teach", "春江花月夜", "user:Who is there?\nsystem:")
BARS = {"transformers 4.31.0": 2e-6, "transformers": 2e-6, "llama.cpp": 2e-5}  # of logits, beside the largest of ours
SPECIAL_TEXTS = ["", " two  spaces ", "user:Who?\nsystem:I.</s>user:Why?\nsystem:", "<s>so"]


class Report:
    """Prints rows, and counts those that are not as they should be."""

    failed = 0

    def row(self, *cells: object, good: bool) -> None:
        self.failed += not good
        print("|", " | ".join(map(str, (*cells, "yes" if good else "NO"))), "|", flush=True)


def head(*cells: str) -> None:
    print("\n|", " | ".join(cells), "|\n|", " | ".join("---" for _ in cells), "|", flush=True)


def run_peer(python: Path, program: str, folder: Path, script: Path = PEER) -> dict[str, Any]:
    command = [str(python), str(script), program, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads((folder / f"{program}.json").read_text(encoding="utf-8"))


def export(source: Path, folder: Path) -> None:
    """Everything that ``peer`` and transformers 4.31.0 read, in float32."""
    for to, name in (("hf", "hf"), ("llama", "llama"), ("gguf", "model.gguf")):
        started = time.perf_counter()
        convert(source, folder / name, to=to, dtype="float32", progress=False)
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)


def write_tasks(
    folder: Path, tokenizer: OpenLlamaTokenizer, prompts: Iterable[str], texts: list[str]
) -> dict[str, Any]:
    tasks = {
        "prompts": [tokenizer.encode(prompt) for prompt in prompts],
        "new_tokens": 32,
        "texts": texts,
        "normalised": [unicodedata.normalize("NFKC", text) for text in texts],
    }
    (folder / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    return tasks


def compare_model(name: str, source: Path, python: Path, report: Report) -> None:
    """Logits and greedy ids in four programs."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        export(source, folder)
        tokenizer = OpenLlamaTokenizer.from_pretrained(source)
        tasks = write_tasks(folder, tokenizer, PROMPTS, [])
        ours = OpenLlamaForCausalLM.from_pretrained(source, dtype="float32", attn_implementation="eager")
        peer.run_tasks(tasks, peer.torch_logits(ours), folder, "ours")
        del ours
        hf = transformers.OpenLlamaForCausalLM.from_pretrained(folder / "hf").eval()
        peer.run_tasks(tasks, peer.torch_logits(hf), folder, "transformers 4.31.0")
        del hf
        versions = {"transformers 4.31.0": ""}
        for program in ("transformers", "llama.cpp"):
            versions[program] = " " + run_peer(python, program, folder)["version"]
        expected = np.load(folder / "ours.npz")
        head("model", "program", "largest difference of logits", "of largest logit", "greedy ids", "as it should be")
        for program, version in versions.items():
            got = np.load(folder / f"{program}.npz")
            pairs = [(expected[key], got[key]) for key in expected.files if key.startswith("logits")]
            difference = max(float(abs(a - b).max()) for a, b in pairs)
            largest = max(float(abs(a).max()) for a, _ in pairs)
            keys = [key for key in expected.files if key.startswith("greedy")]
            same = sum(int((expected[key] == got[key]).sum()) for key in keys)
            total = sum(expected[key].size for key in keys)
            good = same == total and difference <= BARS[program] * max(largest, 1)
            report.row(name, program + version, f"{difference:.1e}", f"{largest:.1f}", f"{same} of {total}", good=good)


def compare_tokenizer(name: str, source: Path, python: Path, report: Report) -> None:
    """Ids of every line, and the chat template."""
    texts = SPECIAL_TEXTS + [line for file in CORPORA for line in corpus(file)]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        tokenizer = OpenLlamaTokenizer.from_pretrained(source)
        for to, target in (("llama", "llama"), ("gguf", "model.gguf")):
            convert(source, folder / target, to=to, progress=False)
        write_tasks(folder, tokenizer, (), texts)
        expected = [tokenizer.encode(text) for text in texts]
        fast, plain = (run_peer(python, program, folder) for program in ("transformers", "llama.cpp"))
        differs = fast["chat"] != ChatTemplate().question("Who is there?")
        report.row(name, "transformers: chat template", "1 text", int(differs), good=not differs)
        rows = {"transformers": fast["ids"], "llama.cpp": plain["ids"]}
        normalises = bool(parse_model_file((source / "tokenizer.model").read_bytes()).charsmap)
        if normalises:
            rows["llama.cpp, text normalised first"] = plain["normalised"]
        for program, got in rows.items():
            different = sum(a != b for a, b in zip(expected, got, strict=True))
            meant = normalises and program == "llama.cpp"  # it does not normalise, which ``convert`` says
            report.row(name, program, f"{len(texts)} texts", different, good=meant or not different)


def check_training(python: Path, report: Report) -> None:
    """What people do with a model of ours in current transformers' Trainer and peft."""
    with tempfile.TemporaryDirectory() as folder:
        done = run_peer(python, "trainer", Path(folder), PEER.with_name("trainer.py"))
    head(f"transformers {done['version']}", "as it should be")
    for name, good in done["found"].items():
        report.row(name if good in (True, False) else f"{name}: {good}", good=good is True)


def random_model(folder: Path, config: OpenLlamaConfig, tokenizer: bytes, **settings: Any) -> Path:
    """A model with random weights and norms, and a tokenizer."""
    torch.manual_seed(0)
    model = randomise_norms(OpenLlamaForCausalLM(config), 0)
    model.save_pretrained(folder)
    return write_folder(folder, tokenizer, tokenizer_config=settings)


def tokenizer_of(name: str) -> bytes | None:
    """A real tokenizer, or None where it is not there, which is said."""
    try:
        return model_bytes(name)
    except (pytest.skip.Exception, pytest.fail.Exception) as reason:
        print(f"\nwithout the tokenizer {name}: {reason}")
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--peer", type=Path, required=True, help="the Python that has current transformers and llama-cpp-python"
    )
    parser.add_argument("--small", action="store_true", help="leave out the model of 880 million parameters")
    options, report = parser.parse_args(), Report()
    warnings.filterwarnings("ignore", message="the tokenizer normalises text")  # the last table shows it
    check_training(options.peer, report)
    compare_model("open-llama-tiny", TINY_CHECKPOINT, options.peer, report)
    real = {name: tokenizer_of(name) for name in ("v1", "v2")}
    with tempfile.TemporaryDirectory() as work:
        if not options.small and real["v1"] is not None:
            large = random_model(Path(work) / "large", PUBLISHED, real["v1"], add_bos_token=False)
            compare_model("random, 880 M", large, options.peer, report)
            shutil.rmtree(large)
        try:
            corpus(CORPORA[0])
        except pytest.skip.Exception as reason:
            print(f"\nwithout the corpora: {reason}")
            return int(report.failed > 0)
        head("tokenizer", "program", "of", "different", "as it should be")
        compare_tokenizer("open-llama-tiny", TINY_CHECKPOINT, options.peer, report)
        settings = {"v1": {"add_bos_token": False}, "v2": {"add_bos_token": True}}
        for name, model in real.items():
            if model is not None:
                size = len(parse_model_file(model).pieces)
                source = random_model(Path(work) / name, replace(SMALL, vocab_size=size + 7), model, **settings[name])
                compare_tokenizer(name, source, options.peer, report)
    return int(report.failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Runs an exported model in another program, in whose environment this file is a script that needs nothing of ours.

    python peer.py transformers|llama.cpp FOLDER

FOLDER holds ``llama`` (a folder), ``model.gguf`` and ``tasks.json``. Writes ``PROGRAM.npz`` there: for each prompt i
the logits of the prompt (``logits.i``) and its greedy continuation (``greedy.i``); and ``PROGRAM.json``: the ids of
texts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Logits = Callable[[list[int]], np.ndarray]  # ids (T) -> (T, V)


def run_tasks(tasks: dict[str, Any], logits: Logits, folder: Path, program: str) -> None:
    """Write what a program makes of the prompts."""
    results = {}
    for i, prompt in enumerate(tasks["prompts"]):
        ids = list(prompt)
        for _ in range(tasks["new_tokens"]):
            found = logits(ids)
            results.setdefault(f"logits.{i}", found)
            ids.append(int(found[-1].argmax()))
        results[f"greedy.{i}"] = np.array(ids[len(prompt) :])
    np.savez(folder / f"{program}.npz", **results)


def torch_logits(model: Any) -> Logits:
    import torch

    def logits(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy()

    return logits


def run_transformers(tasks: dict[str, Any], folder: Path) -> dict[str, Any]:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "llama")
    ids = [tokenizer.encode(text) for text in tasks["texts"]]
    chat = [{"role": "user", "content": "Who is there?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    if tasks["prompts"]:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "llama", dtype=torch.float32, attn_implementation="eager"
        )
        run_tasks(tasks, torch_logits(model.eval()), folder, "transformers")
    return {"version": transformers.__version__, "ids": ids, "chat": asked}


def run_llama_cpp(tasks: dict[str, Any], folder: Path) -> dict[str, Any]:
    import llama_cpp

    path, length = str(folder / "model.gguf"), max(map(len, [*tasks["prompts"], []])) + tasks["new_tokens"]
    vocabulary = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    ids = {
        name: [vocabulary.tokenize(text.encode(), add_bos=True, special=True) for text in tasks[name]]
        for name in ("texts", "normalised")
    }
    if tasks["prompts"]:
        float32 = llama_cpp.GGML_TYPE_F32  # of the cache; float16 by default
        model = llama_cpp.Llama(
            path, n_ctx=length, n_batch=length, logits_all=True, type_k=float32, type_v=float32, verbose=False
        )
        done: list[int] = []

        def logits(prompt: list[int]) -> np.ndarray:
            """Only what is new is computed: the first call is a prompt, the others add a token."""
            if prompt[: len(done)] != done or not done:
                model.reset()
                done.clear()
            model.eval(prompt[len(done) :])
            done[:] = prompt
            return model.scores[: len(prompt)].copy()

        run_tasks(tasks, logits, folder, "llama.cpp")
    return {"version": llama_cpp.__version__, "ids": ids["texts"], "normalised": ids["normalised"]}


PROGRAMS = {"transformers": run_transformers, "llama.cpp": run_llama_cpp}

if __name__ == "__main__":
    program, where = sys.argv[1], Path(sys.argv[2])
    done = PROGRAMS[program](json.loads((where / "tasks.json").read_text(encoding="utf-8")), where)
    (where / f"{program}.json").write_text(json.dumps(done), encoding="utf-8")

"""An engine in a process of its own. Nothing of this package is needed to run the engines of others.

    python workers.py PROGRAM PRECISION MODEL --vocabulary V --threads N [--first]

PROGRAM: one of ``PROGRAMS``. MODEL: the folder or file in the form that it reads. With ``--first`` it makes one token
and ends; else it answers the commands "prefill" and "decode", and "generate" where it has it (``serving``).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from serving import Command, seconds, serve  # beside this file, with nothing but Python's own

Ids = list[list[int]]  # one list a row, all of one length
ROOM = 128  # tokens that a prompt is continued by before it is computed anew
WARM = 2  # tokens that are not timed, after each prompt


class Engine(Protocol):
    """A loaded model that computes prompts and continues them, greedily and for any number of tokens."""

    version: str

    def start(self, ids: Ids, room: int) -> None:
        """Compute the prompts and their first tokens; up to ``room`` tokens follow."""

    def step(self) -> None:
        """One more token of every row."""


def prompt(vocabulary: int, rows: int, length: int) -> Ids:
    draw = random.Random(0)
    return [[draw.randrange(4, vocabulary) for _ in range(length)] for _ in range(rows)]


class Timed:
    """The commands of an engine."""

    def __init__(self, engine: Engine, vocabulary: int) -> None:
        self.engine, self.vocabulary = engine, vocabulary
        self.running: tuple[int, int] | None = None  # rows and length of the prompt that is being continued
        self.room = 0

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Seconds from a prompt of so many tokens to the first token."""
        self.running, ids = None, prompt(self.vocabulary, 1, tokens)
        return {"seconds": [seconds(lambda: self.engine.start(ids, ROOM))]}

    def decode(self, context: int, tokens: int, batch: int = 1) -> dict[str, Any]:
        """Seconds of each of the next tokens; a prompt of ``context`` tokens is computed where none is continued."""
        if hasattr(self.engine, "durations"):
            return {"seconds": self.engine.durations(prompt(self.vocabulary, batch, context), tokens)}
        if self.running != (batch, context) or self.room < tokens:
            self.engine.start(prompt(self.vocabulary, batch, context), ROOM)
            self.running, self.room = (batch, context), ROOM
            for _ in range(WARM):
                self.engine.step()
                self.room -= 1
        self.room -= tokens
        return {"seconds": [seconds(self.engine.step) for _ in range(tokens)]}

    def commands(self) -> dict[str, Command]:
        found: dict[str, Command] = {"prefill": self.prefill, "decode": self.decode}
        if hasattr(self.engine, "generate"):
            found["generate"] = self.generate
        return found

    def generate(self, context: int, tokens: int, **settings: Any) -> dict[str, Any]:
        """Seconds of a whole call of ``generate``, and its ids. The prompt repeats its first quarter, as texts do."""
        [ids] = prompt(self.vocabulary, 1, context - context // 4)
        return self.engine.generate(ids + ids[: context // 4], tokens, **settings)  # type: ignore[attr-defined]


# --- this package ---


class OpenLlama:
    """Through the public interface alone: ``stream``, whose checks are part of the time."""

    def __init__(self, model: str, precision: str, threads: int, fast: bool = False) -> None:
        import torch

        import openllama

        torch.set_num_threads(threads)
        self.version, self.folder, self.assistant = openllama.__version__, model, None
        self.model = fast_model(model, precision) if fast else openllama.OpenLlamaForCausalLM.from_pretrained(model)
        self.tokens: Iterator[Any] = iter(())

    def start(self, ids: Ids, room: int) -> None:
        import torch

        self.tokens = self.model.stream(torch.tensor(ids), max_new_tokens=room + 1, do_sample=False, eos_token_id=None)
        self.step()

    def step(self) -> None:
        next(self.tokens)

    def generate(self, ids: Sequence[int], tokens: int, assistant: str | None = None, lookup: int | None = None) -> Any:
        """``assistant``: the precision of a copy of the model that guesses; ``lookup``: how many tokens to look up."""
        import torch

        if assistant and self.assistant is None:
            self.assistant = fast_model(self.folder, assistant)
        settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
        settings |= {"assistant_model": self.assistant} if assistant else {}
        settings |= {"prompt_lookup_num_tokens": lookup} if lookup else {}
        start = time.perf_counter()
        made = self.model.generate(torch.tensor([ids]), **settings)
        return {"seconds": [time.perf_counter() - start], "ids": made[0, len(ids) :].tolist()}


class FastOpenLlama(OpenLlama):
    def __init__(self, model: str, precision: str, threads: int) -> None:
        super().__init__(model, precision, threads, fast=True)


def fast_model(folder: str, precision: str) -> Any:
    """``precision``: weights are rounded to it while they are read. Where it would not be fast, that is an error."""
    import warnings

    from openllama import OpenLlamaForCausalLM
    from openllama.inference import fast

    warnings.filterwarnings("error", "decoding is not fast")  # also later: a pass looks at the model anew
    settings = {} if precision == "bf16" else {"quantize": precision}
    return fast(OpenLlamaForCausalLM.from_pretrained(folder, **settings))


# --- transformers ---


class Transformers:
    """Its model in a loop of our own, which leaves out the work of its ``generate`` for every token."""

    def __init__(self, model: str, precision: str, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.version = transformers.__version__
        if self.version == "4.31.0":
            kind, name, self.last = transformers.OpenLlamaForCausalLM, "torch_dtype", {}
        else:
            kind, name, self.last = transformers.LlamaForCausalLM, "dtype", {"logits_to_keep": 1}
        self.model = kind.from_pretrained(model, **{name: torch.bfloat16}).eval()
        self.ids: Any = None
        self.past: Any = None

    def start(self, ids: Ids, room: int) -> None:
        import torch

        self.ids, self.past = torch.tensor(ids), None
        self.step()

    def step(self) -> None:
        output = self.model(self.ids, past_key_values=self.past, use_cache=True, **self.last)
        self.ids, self.past = output.logits[:, -1:].argmax(-1), output.past_key_values


# --- llama.cpp ---


class LlamaCpp:
    """Its C functions, without the work of the Python class ``Llama``."""

    def __init__(self, model: str, precision: str, threads: int) -> None:
        import llama_cpp

        self.cpp, self.threads, self.version = llama_cpp, threads, llama_cpp.__version__
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, None)
        settings = llama_cpp.llama_model_default_params()
        settings.use_mmap = True
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), settings)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {model}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context: Any = None
        self.made_for = (0, 0)

    def start(self, ids: Ids, room: int) -> None:
        rows, length = len(ids), len(ids[0])
        self._make_context(rows, length + room + 1)
        for row, tokens in enumerate(ids):
            self._decode([(token, place, row, place == length - 1) for place, token in enumerate(tokens)])
            if row == 0:
                self.next = []
            self.next.append(self._likeliest(-1))
        self.length = length

    def step(self) -> None:
        self._decode([(token, self.length, row, True) for row, token in enumerate(self.next)])
        self.next = [self._likeliest(row) for row in range(len(self.next))]
        self.length += 1

    def _make_context(self, rows: int, length: int) -> None:
        if self.made_for == (rows, length):
            self.cpp.llama_memory_clear(self.cpp.llama_get_memory(self.context), True)
            return
        if self.context:
            self.cpp.llama_free(self.context)
        settings = self.cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = rows * (-(-length // 256) * 256), rows
        settings.n_batch = max(length, 512)
        settings.n_threads = settings.n_threads_batch = self.threads
        self.context = self.cpp.llama_init_from_model(self.model, settings)
        self.made_for = (rows, length)

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Tokens, each with its position, its row, and whether its logits are wanted."""
        batch = self.cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, place, row, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, place, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        failed = self.cpp.llama_decode(self.context, batch)
        self.cpp.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")

    def _likeliest(self, row: int) -> int:
        import numpy as np

        logits = self.cpp.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


# --- OpenVINO ---


class OpenVino:
    """``LLMPipeline`` of openvino-genai; it has no steps, so each measurement computes its prompt anew."""

    def __init__(self, model: str, precision: str, threads: int) -> None:
        import openvino_genai

        self.genai, self.version = openvino_genai, openvino_genai.__version__
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False  # the same prompt is to be computed again
        self.pipeline = openvino_genai.LLMPipeline(
            model, "CPU", scheduler_config=scheduler, INFERENCE_PRECISION_HINT="bf16", PERFORMANCE_HINT="LATENCY",
            INFERENCE_NUM_THREADS=threads,
        )  # fmt: skip

    def start(self, ids: Ids, room: int) -> None:
        self._generate(ids, 1)

    def durations(self, ids: Ids, tokens: int) -> list[float]:
        """Seconds of each of ``tokens`` steps after a prompt, as the pipeline itself measures them."""
        rows = len(ids)
        measured = list(self._generate(ids, 1 + WARM + tokens).perf_metrics.raw_metrics.m_durations)[-tokens * rows :]
        # microseconds, a number for each token of each row, which add up to the time of the step
        return [sum(measured[start : start + rows]) / 1e6 for start in range(0, len(measured), rows)]

    def _generate(self, ids: Ids, tokens: int) -> Any:
        import numpy as np
        import openvino

        settings = self.genai.GenerationConfig()
        settings.max_new_tokens, settings.ignore_eos, settings.do_sample = tokens, True, False
        rows = np.array(ids, dtype=np.int64)
        inputs = self.genai.TokenizedInputs(openvino.Tensor(rows), openvino.Tensor(np.ones_like(rows)))
        return self.pipeline.generate(inputs, settings)


# --- ONNX Runtime ---


class OnnxRuntime:
    """``Generator`` of onnxruntime-genai; threads are set in the model's genai_config.json, by default all cores."""

    def __init__(self, model: str, precision: str, threads: int) -> None:
        import onnxruntime_genai

        self.genai, self.version = onnxruntime_genai, onnxruntime_genai.__version__
        config = onnxruntime_genai.Config(model)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = onnxruntime_genai.Model(config)

    def start(self, ids: Ids, room: int) -> None:
        import numpy as np

        settings = self.genai.GeneratorParams(self.model)
        length = len(ids[0]) + room + 2
        settings.set_search_options(
            max_length=length, min_length=length, batch_size=len(ids), do_sample=False, past_present_share_buffer=True
        )
        self.generator = self.genai.Generator(self.model, settings)
        self.generator.append_tokens(np.array(ids, dtype=np.int32))
        self.step()

    def step(self) -> None:
        self.generator.generate_next_token()


PROGRAMS = {
    "openllama": OpenLlama,
    "openllama-fast": FastOpenLlama,
    "transformers-4.31": Transformers,
    "transformers": Transformers,
    "llama-cpp": LlamaCpp,
    "openvino": OpenVino,
    "onnxruntime": OnnxRuntime,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("precision")
    parser.add_argument("model")
    parser.add_argument("--vocabulary", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--first", action="store_true", help="make one token and end")
    options = parser.parse_args()

    def load() -> tuple[dict[str, Command], dict[str, Any]]:
        engine = PROGRAMS[options.program](options.model, options.precision, options.threads)
        if options.first:
            engine.start(prompt(options.vocabulary, 1, 8), 1)
        return Timed(engine, options.vocabulary).commands(), {"version": engine.version}

    serve(load)


if __name__ == "__main__":
    main()

"""Everything there is to know of a GPU, in one command and 8 minutes: parity, memory, speed and how far from the limit.

    python benchmarks/gpu.py [--device cuda] [--json FILE] [--sections decode training ...]
    python benchmarks/gpu.py --small --device cpu     the same code at small shapes, in seconds

limits    bytes per second of a sum and a copy, operations per second of one large product
parity    sdpa and xformers on the device against eager in float32 on the CPU, values and gradients
backends  time and memory of both by length
decode    one token after the other: ``stream``, a step of fixed shapes, the same step as a CUDA graph
prefill   a prompt, beside the product's rate
training  forward and backward of 880 M parameters, and of LoRA on 6.9 billion

Shares of a limit are of limits measured in the same process. The exit code is 1 if a case failed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sections import Case, Row, failed, markdown, run_cases, run_processes
from torch import Tensor

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM
from openllama.attention import check_backend
from openllama.cache import KeyValue
from openllama.errors import BackendError
from openllama.masks import pack_documents, positions_from_mask
from openllama.model import CausalLM, Inputs

BUDGET = 8 * 60  # seconds
BACKENDS = ("sdpa", "xformers")
KINDS = ("causal", "left padding", "cache", "packed documents")
# Largest difference from float32 eager on a CPU with the same weights, as a part of the largest reference value: about
# three times what a CPU's own sdpa has in half precision; a mask that is dropped makes 0.5.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.0125}
SHARED: dict[str, Any] = {
    "shared_input_output_embedding": True,
    "use_stable_embedding": True,
    "hidden_dropout_prob": 0.0,
    "attention_dropout_prob": 0.0,
    "eos_token_id": None,
    "max_position_embeddings": 8192,
}


class Sizes(NamedTuple):
    """What is measured: the full benchmark, or one for testing it."""

    base: OpenLlamaConfig
    large: OpenLlamaConfig  # trained with LoRA
    parity: OpenLlamaConfig
    parity_length: int
    lengths: tuple[int, ...]  # of the backends' table
    prompts: tuple[int, ...]  # of the prefill
    prompt: int  # before decoding
    new_tokens: int
    row: int  # tokens of a training step
    lora_row: int
    memory: int  # bytes to read for the bandwidth
    product: int  # rows and columns of the large product
    dtypes: tuple[torch.dtype, ...]  # of decoding


def _config(
    vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, gain: float = 2.4
) -> OpenLlamaConfig:
    """``gain``: of a product with random weights; 1 changes the embedding so little that one token is repeated."""
    return OpenLlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, initializer_range=gain / hidden**0.5, **SHARED,
    )  # fmt: skip


FULL = Sizes(
    base=_config(100_000, 2048, 11008, 8, 32),  # aerner/lm-v2: 880 M parameters
    large=_config(100_000, 4096, 11008, 32, 32),  # Open-Llama-V1: 6.9 billion
    parity=_config(1000, 256, 688, 2, 4, gain=1.2),
    parity_length=100,
    lengths=(512, 2048, 8192),
    prompts=(512, 2048),
    prompt=512,
    new_tokens=64,
    row=2048,
    lora_row=1024,
    memory=2**30,
    product=8192,
    dtypes=(torch.float32, torch.bfloat16),
)
_TINY = _config(100, 64, 96, 2, 2)
SMALL = Sizes(
    base=_TINY,
    large=_TINY,
    parity=_config(100, 64, 96, 2, 2, gain=1.2),
    parity_length=12,
    lengths=(8, 16),
    prompts=(8, 16),
    prompt=7,
    new_tokens=6,
    row=16,
    lora_row=8,
    memory=2**20,
    product=64,
    dtypes=(torch.float32,),
)


class Machine(NamedTuple):
    device: torch.device
    sizes: Sizes

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object], repeats: int = 5) -> float:
        """Median time of ``run``, after a first one that sets up kernels."""
        run()
        times = []
        for _ in range(repeats):
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def measured(self, run: Callable[[], object]) -> Row:
        """Median time of ``run``, and the peak of the allocated memory on CUDA, parameters included."""
        if self.device.type != "cuda":
            return {"seconds": self.seconds(run, 3)}
        torch.cuda.reset_peak_memory_stats(self.device)
        seconds = self.seconds(run, 3)
        return {"seconds": seconds, "peak MiB": torch.cuda.max_memory_allocated(self.device) / 2**20}

    def build(
        self, config: OpenLlamaConfig, dtype: torch.dtype = torch.bfloat16, backend: str = "sdpa"
    ) -> OpenLlamaForCausalLM:
        """A model with random weights, drawn on the device in ``dtype``: 6.9 billion take seconds and 13.8 GB."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self.device:
                return OpenLlamaForCausalLM(config, attn_implementation=backend).eval()
        finally:
            torch.set_default_dtype(before)

    def ids(self, config: OpenLlamaConfig, length: int, rows: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(3, config.vocab_size, (rows, length), generator=generator).to(self.device)


# --- limits ---


def reading(machine: Machine) -> float:
    """Bytes per second of a sum over the memory."""
    data = torch.zeros(machine.sizes.memory // 4, device=machine.device)
    return machine.sizes.memory / machine.seconds(data.sum)


def copying(machine: Machine) -> float:
    """Bytes per second, read and written, of a copy on the device."""
    data = torch.zeros(machine.sizes.memory // 4, device=machine.device)
    target = torch.empty_like(data)
    return 2 * machine.sizes.memory / machine.seconds(lambda: target.copy_(data))


def multiplying(machine: Machine) -> float:
    """Operations per second of one large bfloat16 product."""
    size = machine.sizes.product
    left, right = (torch.randn(size, size, device=machine.device).bfloat16() for _ in range(2))
    return 2 * size**3 / machine.seconds(lambda: left @ right)


def limits(machine: Machine) -> Iterator[Case]:
    yield "sum", lambda: {"GB/s": reading(machine) / 1e9}
    yield "copy", lambda: {"GB/s": copying(machine) / 1e9}
    yield "product, bfloat16", lambda: {"TFLOP/s": multiplying(machine) / 1e12}


# --- parity ---


def missing(backend: str, machine: Machine) -> str | None:
    """Why a backend cannot run here."""
    try:
        check_backend(backend, machine.device)
    except BackendError as error:
        return f"not available: {error}"
    return None


def parity(machine: Machine) -> Iterator[Case]:
    for backend in BACKENDS:
        if reason := missing(backend, machine):
            yield backend, partial(dict, message=reason)
            continue
        for dtype in BOUNDS:
            for kind in KINDS:
                yield f"{backend}, {dtype}, {kind}", partial(compared, machine, backend, dtype, kind)


def compared(machine: Machine, backend: str, dtype: torch.dtype, kind: str) -> Row:
    """Differences of the logits and of every parameter's gradient, each as a part of the largest reference value."""
    config = machine.sizes.parity
    tested = machine.build(config, dtype, backend)
    reference = OpenLlamaForCausalLM(config, attn_implementation="eager").eval()
    reference.load_state_dict(tested.state_dict())  # the weights as they were rounded, in float32
    ids = machine.ids(config, machine.sizes.parity_length, rows=2).cpu()
    found, expected = (values_of(model, ids, kind) for model in (tested, reference))
    parts = {name: relative_difference(found[name], expected[name]) for name in expected}
    bound = BOUNDS[dtype]
    logits = parts.pop("logits")
    worst = max(parts, key=lambda name: parts[name])
    return {
        "largest logit": float(expected["logits"].abs().max()),
        "difference of logits": float((found["logits"] - expected["logits"]).abs().max()),
        "relative": logits,
        "gradients, relative": parts[worst],
        "worst gradient": worst,
        "bound": bound,
        "passed": all(part <= bound for part in (logits, *parts.values())),  # not where one is NaN
    }


def values_of(model: OpenLlamaForCausalLM, ids: Tensor, kind: str) -> dict[str, Tensor]:
    """Logits and the gradient of each parameter, in float32 on the CPU."""
    logits = logits_of(model, ids, kind)
    targets = torch.arange(len(logits), device=logits.device) % model.config.vocab_size
    F.cross_entropy(logits, targets).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: value.detach().float().cpu() for name, value in {"logits": logits, **gradients}.items()}


def logits_of(model: OpenLlamaForCausalLM, ids: Tensor, kind: str) -> Tensor:
    """Float32 logits (N, V) of the positions that are not padding; a cache's prompt is continued token by token."""
    length = ids.shape[1]
    mask, positions, ends = torch.ones_like(ids), torch.arange(length)[None], [length]
    if kind == "packed documents":
        mask, positions = pack_documents([length // 3, length - length // 3])
    elif kind != "causal":
        mask[0, : length // 4] = 0
        positions = positions_from_mask(mask)
    if kind == "cache":
        ends = [length - 3, length - 2, length - 1, length]
    past, start, logits = None, 0, []
    for end in ends:
        output = model(
            ids[:, start:end].to(model.device),
            attention_mask=None if kind == "causal" else mask[..., :end].to(model.device),
            position_ids=positions[:, start:end].to(model.device),
            past_key_values=past,
            use_cache=True,
        )
        past, start = output.past_key_values, end
        logits.append(output.logits)
    real = mask.bool() if mask.ndim == 2 else torch.ones_like(ids).bool()
    return torch.cat(logits, dim=1)[real.to(model.device)].float()


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a part of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


# --- time and memory by length ---


def backends(machine: Machine) -> Iterator[Case]:
    """Forward: hidden states, nothing kept. Forward and backward: ``model.loss``, of one row."""
    config = machine.sizes.base
    model = machine.build(config)
    for backend in BACKENDS:
        if reason := missing(backend, machine):
            yield backend, partial(dict, message=reason)
            continue
        model.set_attn_implementation(backend)
        for length in machine.sizes.lengths:
            ids = machine.ids(config, length)
            yield f"{backend}, {length}, forward", partial(machine.measured, partial(forward, model, ids))
            yield f"{backend}, {length}, forward + backward", partial(machine.measured, partial(step, model, ids))


@torch.no_grad()
def forward(model: OpenLlamaForCausalLM, ids: Tensor) -> None:
    model.model(ids, use_cache=False)


def step(model: OpenLlamaForCausalLM, ids: Tensor) -> None:
    """Forward and backward; the gradients go."""
    try:
        model.loss(ids, ids).backward()
    finally:
        model.zero_grad(set_to_none=True)


# --- decoding ---


class StaticCache:
    """Keys and values of all layers in one tensor of fixed shape, written at ``positions`` (T,).

    A mask hides what is not written yet. The model is given positions, so nothing is counted here.
    """

    def __init__(self, model: OpenLlamaForCausalLM, room: int) -> None:
        config = model.config
        shape = (config.num_hidden_layers, 2, 1, config.num_attention_heads, room, config.head_dim)
        self.storage = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.positions = torch.zeros(0, dtype=torch.long, device=model.device)

    def get_seq_length(self) -> int:
        return 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        """Key and value (1, H, T, D) -> those of the whole room (1, H, room, D)."""
        keys, values = self.storage[layer]
        return keys.index_copy_(2, self.positions, key), values.index_copy_(2, self.positions, value)


class StaticDecoder:
    """Greedy decoding of one sequence by a step of fixed shapes that reads nothing back, so it can be captured.

    ``ids`` (1, room) and ``position`` (1,) are on the device: a step reads the token at the position, writes the next
    one behind it and moves on.
    """

    def __init__(self, model: OpenLlamaForCausalLM, prompt: Tensor, new_tokens: int) -> None:
        self.model, self.length = model, prompt.shape[1]
        room = -(-(self.length + new_tokens) // 16) * 16  # kernels want aligned rows of the mask
        self.ids = F.pad(prompt, (0, room - self.length))
        self.places = torch.arange(room, device=prompt.device)
        self.cache = StaticCache(model, room)
        self.position = self.places[:1].clone()
        self.start()

    def start(self) -> None:
        """Compute the prompt, and from it the first new token."""
        self._compute(self.places[: self.length])
        self.position.fill_(self.length)

    def step(self) -> None:
        self._compute(self.position)
        self.position += 1

    @torch.no_grad()
    def _compute(self, positions: Tensor) -> None:
        self.cache.positions = positions
        inputs = Inputs(
            tokens=self.ids.index_select(1, positions),
            mask=(self.places <= positions[:, None])[None, None],  # (1, 1, T, room)
            positions=positions[None],
            cache=self.cache,  # type: ignore[arg-type]
            backend=self.model.attn_implementation,
            use_cache=False,  # this one is written anyway
        )
        logits, _ = CausalLM.forward(self.model, inputs, logits_to_keep=1)
        self.ids.index_copy_(1, positions[-1:] + 1, logits[:, -1].argmax(-1)[None])


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """``run`` as a CUDA graph, after three calls on a stream of their own, which torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def decode(machine: Machine) -> Iterator[Case]:
    sizes = machine.sizes
    for dtype in sizes.dtypes:
        model = machine.build(sizes.base, dtype)
        prompt = machine.ids(sizes.base, sizes.prompt)
        yield f"{dtype}, stream", partial(streamed, machine, model, prompt)
        yield f"{dtype}, static step", partial(stepped, machine, model, prompt, None)
        if machine.device.type == "cuda":
            yield f"{dtype}, CUDA graph", partial(stepped, machine, model, prompt, captured)
        else:
            yield f"{dtype}, CUDA graph", partial(dict, message="needs CUDA")


def streamed(machine: Machine, model: OpenLlamaForCausalLM, prompt: Tensor) -> Row:
    """Time per token of ``model.stream`` after the first token."""
    new = machine.sizes.new_tokens
    for _ in range(2):  # the first time sets up kernels
        tokens = model.stream(prompt, max_new_tokens=new, do_sample=False)
        next(tokens)
        machine.synchronize()
        start = time.perf_counter()
        count = sum(1 for _ in tokens)
        machine.synchronize()
        seconds = (time.perf_counter() - start) / count
    return speed(machine, model, seconds, prompt.shape[1] + new)


def stepped(
    machine: Machine,
    model: OpenLlamaForCausalLM,
    prompt: Tensor,
    capture: Callable[[Callable[[], None]], Callable[[], None]] | None,
) -> Row:
    """Time per token of a static decoder; its ids must be those of ``generate``, or differ where two logits tie."""
    decoder = StaticDecoder(model, prompt, machine.sizes.new_tokens)
    timed(machine, decoder, decoder.step)  # sets up kernels
    seconds, ids = timed(machine, decoder, decoder.step)
    figures: Row = {}
    if capture is not None:
        run = capture(decoder.step)
        timed(machine, decoder, run)
        seconds, replayed = timed(machine, decoder, run)
        figures["as without capture"] = torch.equal(replayed, ids)
        ids = replayed
    return {**speed(machine, model, seconds, decoder.ids.shape[1]), **figures, **agreement(model, prompt, ids)}


def timed(machine: Machine, decoder: StaticDecoder, run: Callable[[], None]) -> tuple[float, Tensor]:
    """Time per step of ``run`` after the first token, and all ids (1, L + new)."""
    decoder.start()
    new = machine.sizes.new_tokens
    machine.synchronize()
    start = time.perf_counter()
    for _ in range(new - 1):
        run()
    machine.synchronize()
    seconds = (time.perf_counter() - start) / (new - 1)
    return seconds, decoder.ids[:, : decoder.length + new].clone()


def agreement(model: OpenLlamaForCausalLM, prompt: Tensor, ids: Tensor) -> Row:
    """How many new ids are ``generate``'s.

    At the first difference, how far the model's logit of the other token is below the best, as a part of it: rounding
    may turn two tokens round, and no more.
    """
    length = prompt.shape[1]
    expected = model.generate(prompt, max_new_tokens=ids.shape[1] - length, do_sample=False)
    equal = int((ids == expected)[0, length:].long().cumprod(0).sum())
    new = expected.shape[1] - length
    figures: Row = {"ids equal": f"{equal} of {new}", "different tokens": len(set(expected[0, length:].tolist()))}
    if equal == new:
        return {**figures, "passed": True}
    with torch.no_grad():
        logits = model(expected[:, : length + equal], logits_to_keep=1).logits[0, -1].float()
    gap = float((logits.max() - logits[ids[0, length + equal]]) / logits.max().abs())
    return {**figures, "gap": gap, "passed": gap <= BOUNDS[model.dtype]}


def speed(machine: Machine, model: OpenLlamaForCausalLM, seconds: float, room: int) -> Row:
    """Time of a token, and the bytes per second of reading the weights and ``room`` cached tokens for it."""
    config = model.config
    cache = 2 * config.num_hidden_layers * config.hidden_size * room
    rate = (model.num_parameters() + cache) * model.dtype.itemsize / seconds  # the table is read by the head
    bandwidth = max(reading(machine), copying(machine))
    return {"ms/token": 1000 * seconds, "GB/s": rate / 1e9, "of the bandwidth": rate / bandwidth}


# --- prefill and training ---


def operations(config: OpenLlamaConfig, length: int, logits: int) -> float:
    """Of a forward pass over one row: products with the weights, causal attention, and ``logits`` positions' logits."""
    size, inner = config.hidden_size, config.intermediate_size
    layer = 2 * length * (4 * size**2 + 3 * size * inner) + 2 * length**2 * size
    return config.num_hidden_layers * layer + 2 * logits * size * config.vocab_size


def throughput(machine: Machine, run: Callable[[], object], tokens: int, work: float) -> Row:
    """Time, memory, tokens per second, and the part of the product's rate that ``work`` operations reach."""
    figures = machine.measured(run)
    rate = work / figures["seconds"]
    return {
        **figures, "tokens/s": tokens / figures["seconds"], "TFLOP/s": rate / 1e12, "MFU": rate / multiplying(machine)
    }  # fmt: skip


def prefill(machine: Machine) -> Iterator[Case]:
    config = machine.sizes.base
    model = machine.build(config)
    for length in machine.sizes.prompts:
        run = partial(compute_prompt, model, machine.ids(config, length))
        yield f"{length} tokens", partial(throughput, machine, run, length, operations(config, length, 1))


@torch.no_grad()
def compute_prompt(model: OpenLlamaForCausalLM, ids: Tensor) -> None:
    model(ids, use_cache=True, logits_to_keep=1)


def training(machine: Machine) -> Iterator[Case]:
    """MFU counts a backward pass as two forward passes, and what is computed again as nothing."""
    sizes = machine.sizes
    model = machine.build(sizes.base).train()
    run = partial(step, model, machine.ids(sizes.base, sizes.row))
    work = 3 * operations(sizes.base, sizes.row, sizes.row)
    for way in ("everything kept", "layers recomputed"):
        if way == "layers recomputed":
            model.gradient_checkpointing_enable()
        yield f"base, {sizes.row} tokens, {way}", partial(throughput, machine, run, sizes.row, work)
    del model, run
    yield f"large, LoRA, {sizes.lora_row} tokens, layers recomputed", partial(lora, machine)


def lora(machine: Machine) -> Row:
    """The weights are frozen: a backward pass is one forward pass, besides what is computed again."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        return {"message": f"needs peft: {error}"}
    config, length = machine.sizes.large, machine.sizes.lora_row
    model = machine.build(config).train()
    model.gradient_checkpointing_enable()
    get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))  # changes the model itself
    run = partial(step, model, machine.ids(config, length))
    return throughput(machine, run, length, 2 * operations(config, length, length))


# --- the whole ---

SECTIONS: dict[str, Callable[[Machine], Iterator[Case]]] = {
    "limits": limits,
    "parity": parity,
    "backends": backends,
    "decode": decode,
    "prefill": prefill,
    "training": training,
}


def about(device: torch.device) -> dict[str, Any]:
    """Where and with what the figures were made."""
    versions = {}
    for package in ("torch", "xformers", "peft"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    name = platform.processor() or platform.machine()
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return {
        "device": name,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        **versions,
        "TF32": torch.backends.cuda.matmul.allow_tf32,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda"),
        help="cuda or cpu; choose among several cards by CUDA_VISIBLE_DEVICES",
    )
    parser.add_argument("--small", action="store_true", help="small shapes: a test of the benchmark itself")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="time for everything (default: %(default)s)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)  # run it in this process
    options = parser.parse_args(arguments)

    def save(found: object) -> None:
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n")

    if options.section is not None:
        machine = Machine(options.device, SMALL if options.small else FULL)
        cases = SECTIONS[options.section](machine)
        return failed(run_cases(cases, time.monotonic() + options.seconds, save))
    command = [sys.executable, __file__, "--device", str(options.device), *["--small"] * options.small]
    commands = {name: [*command, "--section", name] for name in options.sections}
    report = {**about(options.device), "small": options.small, "sections": {}}
    print(", ".join(f"{name} {value}" for name, value in report.items() if name != "sections"))
    for name, rows in run_processes(commands, options.seconds):
        report["sections"][name] = rows
        save(report)
        print(f"\n## {name}\n\n{markdown(rows)}", flush=True)
    return any(map(failed, report["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())

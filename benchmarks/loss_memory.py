"""Peak memory of one training step: ``model.loss`` and the Llama of current transformers, on the same weights.

    python benchmarks/loss_memory.py --peer-python PEER_VENV/bin/python

Each model runs one step (forward and backward) in a new process; the kernel reports the peak of its
resident memory. An Open-Llama with stable and shared embeddings equals a plain Llama whose input table is
LayerNorm(E) and whose head is E. Both get the same random weights and ids, so their losses must agree; if
they do not, the command fails. Dropout is off, because Llama has none.

PEER_VENV needs transformers 5 and the same version of torch as here, but not this package.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

MIB = 2**20
SHAPE = {  # aerner/lm-v2: 880 M parameters
    "vocab_size": 100000,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
}
THEIRS = ("transformers", "transformers, layers recomputed")
FAST = "model.loss, fast products"
ROWS = (*THEIRS, "all logits", "model.loss", FAST, "model.loss, products kept", "model.loss, layers recomputed")
DTYPES = ("bfloat16", "float16", "float32")
TOLERANCE = 0.02  # of the losses, which are about ln(vocab_size); half precision rounds LayerNorm(E)


def main() -> int:
    options = _options()
    if options.measure:
        print(json.dumps(measure(options)))
        return 0
    peer = Path(options.peer_python)
    if problem := missing(peer):
        print(f"loss_memory.py: {problem}", file=sys.stderr)
        return 1
    rows = {name: _in_fresh_process(peer if name in THEIRS else sys.executable, name) for name in options.rows}
    print(_report(rows, options))
    losses = [row["loss"] for row in rows.values()]
    if max(losses) - min(losses) > TOLERANCE:
        print(f"loss_memory.py: the losses {losses} differ: not the same model", file=sys.stderr)
        return 1
    return 0


def common_options(description: str | None, tokens: int) -> argparse.ArgumentParser:
    """The peer, the model and its input."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter that has transformers 5 and the same torch")
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--tokens", type=int, default=tokens, help="tokens of the one sequence (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--threads", type=int, default=2)
    return parser


def _options() -> argparse.Namespace:
    parser = common_options(__doc__, tokens=2048)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="what to measure (default: everything)")
    parser.add_argument("--measure", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.peer_python or options.measure):
        parser.error("--peer-python is needed: the interpreter of a virtual environment with transformers 5")
    return options


def missing(peer: Path) -> str | None:
    """Why the comparison cannot run, or None if it can."""
    if not Path("/proc/self/clear_refs").exists():
        return "peak memory is read from /proc, which this system does not have; run it on Linux"
    if not peer.is_file():
        return f"--peer-python {peer}: no such file"
    code = "import torch, transformers; print(torch.__version__, transformers.__version__)"
    found = subprocess.run([peer, "-c", code], capture_output=True, text=True)
    if found.returncode:
        return f"{peer} lacks torch or transformers ({found.stderr.strip().splitlines()[-1]}); install both"
    torch_version, version = found.stdout.split()
    if int(version.split(".")[0]) < 5:
        return f"{peer} has transformers {version}; version 5 is needed"
    import torch

    if torch_version != torch.__version__:
        return f"{peer} has torch {torch_version}, this interpreter {torch.__version__}; they must be the same"
    return None


def _in_fresh_process(python: str | Path, which: str) -> dict[str, Any]:
    command = [python, __file__, *sys.argv[1:], "--measure", which]
    environment = {**os.environ, "PYTHONPATH": "" if which in THEIRS else os.environ.get("PYTHONPATH", "")}
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One training step in this process: bytes, seconds and the loss."""
    import torch

    torch.set_num_threads(options.threads)
    torch.set_default_dtype(getattr(torch, options.dtype))
    shape = {name: getattr(options, name) for name in SHAPE} | {"max_position_embeddings": options.tokens}
    model, loss_of, version = (build_peer if options.measure in THEIRS else build_ours)(shape, options.measure)
    model.train()
    ids = torch.randint(options.vocab_size, (1, options.tokens), generator=torch.Generator().manual_seed(1))

    loss_of(ids[:, :8]).backward()  # sets up threads and kernels before the measurement
    model.zero_grad(set_to_none=True)
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    start = time.perf_counter()
    loss = loss_of(ids)
    loss.backward()
    seconds = time.perf_counter() - start
    return {
        "version": version,
        "torch": torch.__version__,
        "parameters": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters()),
        "before": before,
        "peak": _status("VmHWM"),
        "seconds": seconds,
        "loss": loss.item(),
    }


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS is the resident memory, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def build_ours(shape: dict[str, int], row: str) -> tuple[Any, Any, str]:
    import openllama
    from openllama.products import FastProducts
    from openllama.recompute import keep_products

    config = openllama.OpenLlamaConfig(**shape, hidden_dropout_prob=0.0, attention_dropout_prob=0.0)
    model = openllama.OpenLlamaForCausalLM(config)
    body = model.model
    _draw([body.embedding.tokens, *_linears(body.layers, "attention")])
    if row == "model.loss, products kept":
        model.gradient_checkpointing_enable({"context_fn": keep_products})
    elif row == "model.loss, layers recomputed":
        model.gradient_checkpointing_enable()
    if row == "all logits":
        return model, lambda ids: model(ids, labels=ids, use_cache=False).loss, f"openllama {openllama.__version__}"
    products = FastProducts if row == FAST else nullcontext

    def loss(ids: Any) -> Any:
        with products():
            return model.loss(ids, ids)

    return model, loss, f"openllama {openllama.__version__}"


def build_peer(shape: dict[str, int], row: str) -> tuple[Any, Any, str]:
    import torch
    import transformers

    config = transformers.LlamaConfig(**shape, rms_norm_eps=1e-6, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config)
    _draw([model.lm_head, *_linears(model.model.layers, "self_attn")])
    with torch.no_grad():
        table = torch.nn.functional.layer_norm(model.lm_head.weight, (config.hidden_size,), eps=1e-5)
        model.model.embed_tokens.weight.copy_(table)
    if "recomputed" in row:
        model.gradient_checkpointing_enable()
    version = f"transformers {transformers.__version__}"
    return model, lambda ids: model(ids, labels=ids, use_cache=False).loss, version


def _linears(layers: Any, attention: str) -> list[Any]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return [
        linear
        for layer in layers
        for linear in (
            *(getattr(getattr(layer, attention), name) for name in names),
            layer.mlp.gate_proj,
            layer.mlp.up_proj,
            layer.mlp.down_proj,
        )
    ]


def _draw(modules: list[Any]) -> None:
    """Draw weights from one seed; both models list their modules in the same order, so they get the same weights."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for module in modules:
        torch.nn.init.normal_(module.weight, std=0.02, generator=generator)


def _report(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    """A table in Markdown, all sizes in MiB."""
    shape = ", ".join(f"{name} {getattr(options, name)}" for name in SHAPE)
    version = ", ".join(sorted({row["version"] for row in rows.values()}))
    lines = [
        f"{shape}; {options.dtype}, 1 x {options.tokens} tokens, forward and backward, {options.threads} threads, "
        f"torch {next(iter(rows.values()))['torch']}, {version}",
        "",
        "| MiB | before | peak | peak - parameters - gradients | relative to first row | seconds | loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    first: int | None = None
    for name, row in rows.items():
        rest = row["peak"] - row["parameters"] - row["gradients"]
        first = first or rest
        sizes = " | ".join(f"{size / MIB:.0f}" for size in (row["before"], row["peak"], rest))
        lines.append(f"| {name} | {sizes} | {rest / first:.2f} | {row['seconds']:.1f} | {row['loss']:.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""``python -m tests.parity.cpus``: the comparison with transformers, computed as other processors would.

The libraries below torch choose their kernels by processor, and environment variables make them choose those
of an older one. What each variable changes, found by comparing results on an AMD EPYC (Zen 4, AVX-512) with
torch 2.13.0 on 2026-11-24:

    ATEN_CPU_CAPABILITY      torch's own kernels: softmax, activations, norms, sdpa, normally distributed draws
    ONEDNN_MAX_CPU_ISA       oneDNN: GELU, and matrix products in bfloat16
    MKL_CBWR                 MKL: matrix products in float32; COMPATIBLE gives one set of kernels, all other values
                             a second, none a third, the only one that rounds by the alignment of its operands
    MKL_ENABLE_INSTRUCTIONS  nothing there; it is for Intel processors

and a second thread changes products in float32, which MKL divides in another way.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
SSE4 = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
PROCESSORS = {
    "own": {},
    "avx2": AVX2,
    "avx2-cbwr": {**AVX2, "MKL_CBWR": "AVX2"},
    "sse4": SSE4,
    "sse4-cbwr": {**SSE4, "MKL_CBWR": "COMPATIBLE"},
}
THREADS = (1, 2)


class Result(NamedTuple):
    """One run of tests/parity, as it is printed."""

    processor: str
    kernels: str  # torch's name of those that it used
    threads: int
    passed: int
    failed: int
    models: int  # compared with transformers
    seconds: int


def run(processor: str, threads: int) -> Result:
    """Run tests/parity in a process of its own; what it says of failures is printed."""
    environment = {**os.environ, **PROCESSORS[processor], "OPENLLAMA_TEST_THREADS": str(threads)}
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # where other programs run, threads that spin take ten times as long
    command = [sys.executable, "-m", "pytest", "--quiet", "tests/parity"]
    if threads == 1:
        command += ["--numprocesses=auto", "--maxprocesses=4", "--dist=worksteal"]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    seconds = round(time.monotonic() - start)
    if done.returncode:
        print(done.stdout)
    if done.returncode not in (0, 1):  # 1: some tests failed
        raise SystemExit(f"pytest ended with exit code {done.returncode}")
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])}
    models = sum(map(int, re.findall(r"^ *(\d+) models, ", done.stdout, re.M)))
    used = re.search(r"^computed by (\w+) kernels of torch, threads: (\d+)$", done.stdout, re.M)
    kernels, count = used.groups() if used else ("no", "0")
    if (kernels, count) != (PROCESSORS[processor].get("ATEN_CPU_CAPABILITY", kernels).upper(), str(threads)):
        raise SystemExit(
            f"{processor} with {threads} threads cannot be imitated: torch used {kernels} kernels, threads: {count}"
        )
    failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    return Result(processor, kernels, threads, counts.get("passed", 0), failed, models, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare with transformers as other processors would.")
    parser.add_argument("--processor", choices=PROCESSORS, action="append", help="may be repeated (default: all)")
    parser.add_argument("--threads", type=int, action="append", help="may be repeated (default: 1 and 2)")
    options = parser.parse_args()
    if platform.machine() not in ("x86_64", "AMD64"):
        raise SystemExit(f"only x86-64 processors can be imitated, this is {platform.machine()}")
    results = []
    for processor in options.processor or PROCESSORS:
        for threads in options.threads or THREADS:
            settings = " ".join(f"{name}={value}" for name, value in PROCESSORS[processor].items())
            print(f"{processor}, threads: {threads}  {settings}", flush=True)
            results.append(run(processor, threads))
    print("processor  kernels  threads  passed  failed  models compared  seconds")
    for result in results:
        print("{:9}  {:7}  {:7}  {:6}  {:6}  {:15}  {:7}".format(*result))
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())

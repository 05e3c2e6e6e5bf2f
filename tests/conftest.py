"""Profiles of the property tests, and the count of models compared with the oracle."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from openllama import compiler

quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=quiet, database=None)
settings.register_profile("long", deadline=None, suppress_health_check=quiet, print_blob=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# The models are tiny: a second thread costs more than it gives.
torch.set_num_threads(int(os.environ.get("OPENLLAMA_TEST_THREADS", "1")))
for absent in (torch.cuda, torch.xpu):  # else each seed is kept for them, with the text of the stack: milliseconds
    if not absent.is_available():
        absent.manual_seed_all = lambda seed: None
torch.manual_seed(0)  # random arguments of tests are in their names, by which processes share the tests out


@pytest.fixture(autouse=True)
def _fixed_seed_and_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


PROCESSORS = {"AVX-512": ["-march=x86-64-v4"], "AVX2": ["-march=x86-64-v3"], "SSE4": ["-march=x86-64-v2"]}


@pytest.fixture(params=["this processor", *PROCESSORS])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Loops are built for a processor; the name of it."""
    name = request.param
    if name in PROCESSORS:
        cpu = Path("/proc/cpuinfo").read_text()
        if "flags" not in cpu or (name == "AVX-512" and "avx512bw" not in cpu):
            pytest.skip(f"this processor cannot run {name}")
        monkeypatch.setattr(compiler, "_tuned", lambda: PROCESSORS[name])
    compiler.library.cache_clear()
    yield name
    compiler.library.cache_clear()


_compared: Counter[str] = Counter()  # by all processes that run tests


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Count what this process has compared, or hand it to the process that sums up."""
    oracle = sys.modules.get("tests.oracle")
    if found := dict(getattr(oracle, "compared", {})):
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["compared"] = found
        else:
            _compared.update(found)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any) -> None:
    _compared.update(getattr(node, "workeroutput", {}).get("compared", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _compared:
        return
    terminalreporter.write_sep("-", "compared with transformers 4.31.0")
    for bar, count in sorted(_compared.items()):
        terminalreporter.write_line(f"{count:7d} {bar}")
    kernels, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    terminalreporter.write_line(f"computed by {kernels} kernels of torch, threads: {threads}")

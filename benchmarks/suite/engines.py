"""Who is measured: ours and the peers, with the interpreter that has each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-bench"  # PEERS / "llama-cpp" / "bin" / "python", if it exists
PACKAGES = {  # what a peer needs, and the package that has its version
    "transformers": "transformers",
    "llama-cpp": "llama_cpp_python",
    "openvino": "openvino_genai",
    "onnxruntime": "onnxruntime_genai",
}


@dataclass(frozen=True)
class Engine:
    name: str  # in tables
    program: str  # of workers.py
    precision: str
    form: str  # of models.py
    peer: str = ""  # the environment; "" for this one

    @property
    def ours(self) -> bool:
        return self.program.startswith("openllama")


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("openllama bf16", "openllama", "bf16", "native"),
        Engine("openllama fast bf16", "openllama-fast", "bf16", "native"),
        Engine("openllama fast int8", "openllama-fast", "int8", "native"),
        Engine("openllama fast int4", "openllama-fast", "int4", "native"),
        Engine("transformers 4.31.0 bf16", "transformers-4.31", "bf16", "hf"),
        Engine("transformers bf16", "transformers", "bf16", "llama", "transformers"),
        Engine("llama.cpp bf16", "llama-cpp", "bf16", "bf16.gguf", "llama-cpp"),
        Engine("llama.cpp Q8_0", "llama-cpp", "int8", "int8.gguf", "llama-cpp"),
        Engine("llama.cpp Q4_0", "llama-cpp", "int4", "int4.gguf", "llama-cpp"),
        Engine("OpenVINO bf16", "openvino", "bf16", "openvino-bf16", "openvino"),
        Engine("OpenVINO int8", "openvino", "int8", "openvino-int8", "openvino"),
        Engine("OpenVINO int4", "openvino", "int4", "openvino-int4", "openvino"),
        Engine("ONNX Runtime int8", "onnxruntime", "int8", "onnxruntime-int8", "onnxruntime"),
        Engine("ONNX Runtime int4", "onnxruntime", "int4", "onnxruntime-int4", "onnxruntime"),
    )
}
REFERENCE, FAST, HF_431 = "openllama bf16", "openllama fast bf16", "transformers 4.31.0 bf16"


def interpreter(engine: Engine, given: Mapping[str, Path]) -> Path:
    """``given`` with ``--peer-python``, that below ``.venv-bench``, or the one that runs this."""
    usual = PEERS / engine.peer / "bin" / "python"
    return given.get(engine.peer) or (usual if engine.peer and usual.exists() else Path(sys.executable))


def problem(engine: Engine, python: Path) -> str | None:
    """Why an engine cannot run there, or None."""
    if engine.ours:
        return None
    package = PACKAGES[engine.peer] if engine.peer else "transformers"
    code = f"from importlib.metadata import version; print(version({package!r}))"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"not installed: {error}"
    version = found.stdout.strip()
    if found.returncode:
        return f"not installed: no {package}"
    if package == "transformers" and (version == "4.31.0") == bool(engine.peer):
        return f"not installed: transformers {version} is there, needed is {'5' if engine.peer else '4.31.0'}"
    return None

"""Writes a model in the form of another program, by that program's own exporter, in whose environment this runs.

python exports.py FORM SOURCE TARGET
"""

from __future__ import annotations

import subprocess
import sys


def gguf_int4(source: str, target: str) -> None:
    """Q4_0 for every matrix, the head as well."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    settings.pure = True
    if failed := llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings):
        raise RuntimeError(f"llama_model_quantize returned {failed}")


def openvino(source: str, target: str, *settings: str) -> None:
    command = ("from optimum.commands.optimum_cli import main; main()", "export", "openvino", "--model", source)
    subprocess.run(
        [sys.executable, "-c", *command, "--task", "text-generation-with-past", *settings, target], check=True
    )


def onnxruntime(source: str, target: str, precision: str) -> None:
    settings = ["accuracy_level=4", "block_size=32"]  # products of int8; a scale for 32 weights
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", target, "-e", "cpu"]
    command += ["-p", precision, "-c", f"{target}-cache", "--extra_options", *settings]
    subprocess.run(command, check=True)


INT4 = ["--weight-format", "int4", "--group-size", "32", "--group-size-fallback", "adjust", "--sym", "--ratio", "1.0"]
FORMS = {
    "int4.gguf": gguf_int4,
    "openvino-bf16": lambda *paths: openvino(*paths, "--weight-format", "fp16"),  # there is no bf16
    "openvino-int8": lambda *paths: openvino(*paths, "--weight-format", "int8"),
    "openvino-int4": lambda *paths: openvino(*paths, *INT4, "--all-layers"),
    "onnxruntime-int8": lambda *paths: onnxruntime(*paths, "int8"),
    "onnxruntime-int4": lambda *paths: onnxruntime(*paths, "int4"),
}

if __name__ == "__main__":
    FORMS[sys.argv[1]](*sys.argv[2:])

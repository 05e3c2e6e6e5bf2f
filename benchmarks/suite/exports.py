"""Writes a model in the form of another program, by that program's own exporter, in whose environment this runs.

    python exports.py FORM SOURCE TARGET
"""

from __future__ import annotations

import sys


def gguf_int4(source: str, target: str) -> None:
    """Q4_0 for every matrix, the head as well."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    settings.pure = True
    if failed := llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings):
        raise RuntimeError(f"llama_model_quantize returned {failed}")


FORMS = {"int4.gguf": gguf_int4}

if __name__ == "__main__":
    FORMS[sys.argv[1]](*sys.argv[2:])

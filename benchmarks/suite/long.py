"""A process that computes a long prompt by the fast model, and says what memory it took.

    python long.py --shape JSON --tokens T --threads N

The model is random, in bfloat16, with linear RoPE for T tokens.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from serving import Command, peak_of, resident, serve  # beside this file


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", type=json.loads, required=True, help="of the model, as in its config")
    parser.add_argument("--tokens", type=int, required=True, help="of the longest prompt")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()

    def load() -> tuple[dict[str, Command], dict[str, Any]]:
        import torch

        import openllama
        from openllama.inference import fast

        torch.set_num_threads(options.threads)
        torch.set_default_dtype(torch.bfloat16)
        original = max(1, options.tokens // 8)
        rope = {"type": "linear", "factor": 8.0}
        config = openllama.OpenLlamaConfig(**options.shape, max_position_embeddings=original, rope_scaling=rope)
        model = fast(openllama.OpenLlamaForCausalLM(config).eval())
        if model.reason:
            raise RuntimeError(f"decoding is not fast: {model.reason}")
        model.generate(torch.ones(1, 64, dtype=torch.long), max_new_tokens=1)  # sets up threads and kernels

        def peak(tokens: int) -> dict[str, Any]:
            """Bytes by which the process grew at the most, from a prompt to its first token."""
            ids = torch.randint(options.shape["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0))
            before = resident()
            most = peak_of(lambda: model.generate(ids, max_new_tokens=1, do_sample=False))
            return {"bytes": most - before}

        return {"peak": peak}, {"version": openllama.__version__}

    serve(load)


if __name__ == "__main__":
    main()

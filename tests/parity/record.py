"""``python -m tests.parity.record``: let the oracle confirm the golden numbers, and write them.

Nothing is written unless transformers' float32 numbers are close to all of them and its ids are the same.
"""

from __future__ import annotations

import json
import platform
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import golden_cases as cases
from tests.oracle import transformers
from tests.parity.draws import hf_model


def oracle(name: str) -> Any:
    """A fresh transformers model of a case in float32; fresh, because its dynamic RoPE remembers earlier calls."""
    if name == cases.SHIPPED:
        return transformers.OpenLlamaForCausalLM.from_pretrained(cases.FOLDER).eval()
    head = "ForSequenceClassification" if name == "classifier" else "ForCausalLM"
    model = hf_model(cases.config_of(name), seed=0, kind=f"OpenLlama{head}")
    return drawn(model, seed=90 + len(name))  # other seeds give models whose float32 numbers are far off, or near ties


def drawn(model: Any, seed: int) -> Any:
    """The model with weights that are the same on every processor, which torch's normal numbers are not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            uniform = torch.rand(weight.shape, generator=generator)
            weight.copy_(0.5 + uniform if weight.ndim == 1 else 1.5 * (uniform - 0.5))
        padding = model.get_input_embeddings().padding_idx
        if padding is not None:
            model.get_input_embeddings().weight[padding] = 0
    return model


def weights_of(name: str) -> dict[str, Tensor]:
    """Those of a drawn model, as HF stores them but for ``inv_freq``; the shipped model has its own files."""
    if name == cases.SHIPPED:
        return {}
    state = oracle(name).state_dict()
    return {key: value.clone() for key, value in state.items() if not key.endswith("inv_freq")}


def golden(name: str) -> dict[str, Tensor]:
    """All that the file holds of a case; ids are those of our float32 model, as torch draws others in float64."""
    weights, inputs = weights_of(name), cases.inputs_of(name)
    texts = cases.texts_of(cases.our_model(name, weights), inputs)
    return {
        **{f"weights/{key}": value for key, value in weights.items()},
        **{f"inputs/{key}": value for key, value in inputs.items()},
        **{f"outputs/{key}": value for key, value in texts.items()},
        **cases.golden_numbers(name, weights, inputs),
    }


def confirm(name: str, tensors: dict[str, Tensor]) -> None:
    """Raise ``AssertionError`` unless transformers has these weights, makes these ids, and numbers close to these."""
    inputs = {key.removeprefix("inputs/"): value for key, value in tensors.items() if key.startswith("inputs/")}
    exact = {f"weights/{key}": value for key, value in weights_of(name).items()}
    exact |= {f"outputs/{key}": value for key, value in cases.texts_of(oracle(name), inputs).items()}
    close = cases.numbers_of(oracle(name), name, inputs)
    differing = tensors.keys() ^ {*(f"inputs/{key}" for key in inputs), *exact, *close}
    if differing:
        raise AssertionError(f"{name}: not on both sides: {sorted(differing)}")
    for key, value in exact.items():
        if not torch.equal(tensors[key], value):
            raise AssertionError(f"{name}: {key} is not what transformers has")
    for key, value in close.items():
        torch.testing.assert_close(tensors[key], value, msg=lambda text, key=key: f"{name}: {key}: {text}")


def main() -> None:
    versions = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    configurations = {name: cases.config_of(name).to_dict() for name in cases.CASES}
    tensors: dict[str, Tensor] = {}
    for name in cases.CASES:
        case = golden(name)
        confirm(name, case)
        tensors |= {f"{name}/{key}": value.contiguous() for key, value in case.items()}
    about = json.dumps({"versions": versions, "configurations": configurations})
    save_file(tensors, cases.FILE, {"about": about})  # one entry: several are written in any order


if __name__ == "__main__":
    main()

"""``python -m tests.parity.record``: run the oracle and write what it returns to tests/recorded."""

from __future__ import annotations

import dataclasses
import json
import platform

import torch
from safetensors.torch import save_file
from torch import Tensor

from openllama.checkpoint import hf_to_native
from tests import recorded_cases as cases
from tests.oracle import transformers
from tests.parity.draws import randomise_norms


def record(name: str) -> dict[str, Tensor]:
    """Weights, inputs, outputs and gradients of a fresh HF model, as one recording holds them."""
    config = cases.config_of(name)
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in ("extra",)}
    head = "ForSequenceClassification" if name == "classifier" else "ForCausalLM"
    torch.manual_seed(len(name))
    model = getattr(transformers, f"OpenLlama{head}")(transformers.OpenLlamaConfig(**fields))
    randomise_norms(model, len(name)).eval()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    inputs = cases.inputs_of(name)
    outputs = cases.outputs_of(model, inputs)
    kinds = {
        "weights": weights,
        "inputs": inputs,
        "outputs": outputs,
        "gradients": hf_to_native(cases.gradients_of(model)),
    }
    return {f"{kind}/{key}": value.contiguous() for kind, part in kinds.items() for key, value in part.items()}


def main() -> None:
    header = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    cases.FOLDER.mkdir(exist_ok=True)
    for name in cases.CASES:
        metadata = {key: json.dumps(value) for key, value in header.items()}
        metadata["config"] = json.dumps(cases.config_of(name).to_dict())
        save_file(record(name), cases.FOLDER / f"{name}.safetensors", metadata)


if __name__ == "__main__":
    main()

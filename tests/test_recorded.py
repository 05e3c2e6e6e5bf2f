"""Our outputs against recorded ones of transformers 4.31.0: the comparison that every Python can make."""

from __future__ import annotations

import pytest
import torch

from openllama import OpenLlamaConfig
from tests import recorded_cases as cases


@pytest.mark.parametrize("name", cases.CASES)
def test_outputs_and_gradients_equal_the_recording(name):
    recorded, header = cases.read(name)
    assert header["transformers"] == "4.31.0"
    assert OpenLlamaConfig.from_dict(header["config"]) == cases.config_of(name)
    model = cases.our_model(name, recorded["weights"])
    outputs = cases.outputs_of(model, recorded["inputs"])
    gradients = cases.gradients_of(model)
    assert outputs.keys() == recorded["outputs"].keys()
    assert gradients.keys() == recorded["gradients"].keys()
    for kind, ours in (("outputs", outputs), ("gradients", gradients)):
        for key, value in ours.items():
            torch.testing.assert_close(value, recorded[kind][key], msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", cases.CASES)
def test_the_recorded_inputs_are_those_of_the_case(name):
    recorded, _ = cases.read(name)
    for key, value in cases.inputs_of(name).items():
        assert torch.equal(recorded["inputs"][key], value)

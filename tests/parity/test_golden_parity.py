"""The golden numbers are what the oracle says today."""

from __future__ import annotations

import pytest
import torch

from tests import golden_cases as cases
from tests.oracle import compared, transformers
from tests.parity.record import confirm, golden

pytestmark = pytest.mark.filterwarnings("ignore:a sequence of more than")


def stored(name: str) -> dict[str, torch.Tensor]:
    return {f"{kind}/{key}": value for kind, part in cases.read(name).items() for key, value in part.items()}


@pytest.mark.parametrize("name", cases.CASES)
def test_transformers_confirms_the_golden_numbers(name):
    assert cases.read_header()["versions"]["transformers"] == transformers.__version__
    confirm(name, stored(name))
    compared["models, golden numbers"] += 1


@pytest.mark.parametrize("name", cases.CASES)
def test_the_writer_would_write_them_again(name):
    again, before = golden(name), stored(name)
    assert again.keys() == before.keys()
    for key, value in again.items():
        assert value.dtype == before[key].dtype
        torch.testing.assert_close(value, before[key], rtol=2**-23, atol=0)  # the last bit: see tests/test_golden.py


@pytest.mark.parametrize(
    "key", ["weights/model.norm.weight", "outputs/keys.0", "outputs/greedy", "gradients/score.weight"]
)
def test_the_writer_refuses_what_transformers_does_not_confirm(key):
    name = "classifier" if "score" in key else "v1"
    tensors = stored(name)
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[3] += 1
    with pytest.raises(AssertionError, match=key):
        confirm(name, tensors)
    with pytest.raises(AssertionError, match="not on both sides"):
        confirm(name, {**stored(name), "outputs/more": torch.ones(1)})

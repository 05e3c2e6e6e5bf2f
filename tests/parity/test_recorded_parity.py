"""The recordings are what the oracle says today."""

from __future__ import annotations

import pytest
import torch

from tests import recorded_cases as cases
from tests.oracle import compared, transformers
from tests.parity.record import record


@pytest.mark.parametrize("name", cases.CASES)
def test_a_new_recording_equals_the_stored_one(name):
    fresh = record(name)
    stored, header = cases.read(name)
    assert header["transformers"] == transformers.__version__
    stored = {f"{kind}/{key}": value for kind, part in stored.items() for key, value in part.items()}
    assert stored.keys() == fresh.keys()
    for key, value in fresh.items():
        torch.testing.assert_close(stored[key], value, msg=lambda text, key=key: f"{key}: {text}")
    compared["recordings made anew"] += 1

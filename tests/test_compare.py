"""Comparing weights: statistics of one checkpoint, and how far two are apart."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openllama.checkpoint import diff
from openllama.checkpoint import pieces as module
from openllama.checkpoint.compare import as_table, by_kind, compare, statistics
from openllama.errors import KeyMismatchError
from tests.checkpoints import hf_weights, native_weights, tiny_config, write_checkpoint
from tests.draw import examples

CONFIG = tiny_config()
NORM = "model.norm.weight"


@examples(60)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    piece=st.integers(1, 40),
    odd=st.lists(st.sampled_from((math.nan, math.inf, -math.inf, 0.0)), max_size=3),
)
def test_statistics_are_those_of_numpy(shape: list[int], dtype: torch.dtype, piece: int, odd: list[float]) -> None:
    tensor = torch.randn(shape).to(dtype)
    tensor.flatten()[: len(odd)] = torch.tensor(odd[: tensor.numel()]).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", piece)
        found = statistics({"a": tensor})["a"]
    values = tensor.double().numpy()
    finite = values[np.isfinite(values)]
    assert (found.numbers, found.not_finite) == (values.size, values.size - finite.size)
    assert found.zeros == (values == 0).sum()
    if finite.size:
        assert (found.low, found.high) == (finite.min(), finite.max())
        assert found.mean == pytest.approx(finite.mean(), abs=1e-6)
        assert found.std == pytest.approx(finite.std(), abs=1e-6)


def test_layers_are_taken_together_by_kind() -> None:
    weights = {f"model.layers.{i}.mlp.up_proj.weight": torch.full((2, 3), float(i)) for i in range(12)}
    kinds = by_kind(statistics({**weights, NORM: torch.ones(4)}))
    assert list(kinds) == ["model.layers.N.mlp.up_proj.weight", NORM]
    together = kinds["model.layers.N.mlp.up_proj.weight"]
    assert (together.numbers, together.low, together.high, together.mean) == (72, 0, 11, 5.5)


@examples(60)
@given(
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16)),
    other=st.sampled_from((torch.float64, torch.float32, torch.float16)),
    piece=st.integers(1, 40),
)
def test_errors_are_those_of_numpy(dtype: torch.dtype, other: torch.dtype, piece: int) -> None:
    a = torch.randn(5, 7).to(dtype)
    b = (a.double() + torch.randn(5, 7).double() * 1e-3).to(other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", piece)
        [found] = compare({"w": a}, {"w": b}).weights
    first, second = a.double().numpy(), b.double().numpy()
    assert found.different == (first != second).sum()
    assert found.max_error == pytest.approx(np.abs(second - first).max(), rel=1e-5)
    assert found.relative_error == pytest.approx(np.sqrt(((second - first) ** 2).mean() / (first**2).mean()), rel=1e-4)


def test_the_same_weights_are_equal_in_every_layout(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", hf_weights(CONFIG), CONFIG)
    write_checkpoint(tmp_path / "b", native_weights(CONFIG), CONFIG, "safetensors shards")
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found.equal
    assert str(found).endswith("the same 22 weights, bit for bit")


def test_each_difference_is_listed(tmp_path: Path) -> None:
    weights = native_weights(CONFIG)
    write_checkpoint(tmp_path / "a", weights, CONFIG)
    weights[NORM] = weights[NORM].clone()
    weights[NORM][1] += 2
    weights[NORM][3] = -0.0
    write_checkpoint(tmp_path / "b", weights, CONFIG)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert not found.equal
    assert {weight.name: weight.different for weight in found.weights if weight.different} == {NORM: 2}
    [line] = [line for line in str(found).splitlines() if line.startswith(NORM)]
    assert line.split()[:4] == [NORM, "float32", "1", "2"]


def test_other_types_and_names_are_differences() -> None:
    a, b = {"x": torch.ones(3), "y": torch.ones(2), "z": torch.ones(2)}, {"x": torch.ones(3).half(), "z": torch.ones(3)}
    found = compare(a, b)
    assert not found.equal
    assert (found.only_a, found.only_b, found.misshaped) == (("y",), (), ("z is (2,) and (3,)",))
    assert found.weights[0].dtypes == ("float32", "float16")
    assert not compare({"x": a["x"]}, {"x": b["x"]}).equal
    assert compare(a, a).equal


def test_infinities_and_nan_that_both_have_are_no_errors() -> None:
    a = torch.tensor([math.inf, math.nan, -math.inf, 1.0])
    assert compare({"x": a}, {"x": a.clone()}).equal
    [found] = compare({"x": a}, {"x": torch.tensor([math.inf, math.nan, -math.inf, 1.5])}).weights
    assert (found.different, found.max_error) == (1, 0.5)


@pytest.mark.parametrize("place", range(3))
def test_nan_in_any_place_is_the_largest_error(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    monkeypatch.setattr(module, "PIECE", 1)
    a = {f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(3) for i in range(3)}
    b = {name: torch.tensor([1.0, 2.0, 3.0]) for name in a}
    b[f"model.layers.{place}.mlp.up_proj.weight"][place] = math.nan
    found = compare(a, b)
    assert math.isnan(found.weights[place].max_error)
    assert found.table().splitlines()[1].split()[4] == "nan"


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    weights = native_weights(CONFIG)
    write_checkpoint(tmp_path / "a", weights, CONFIG)
    del weights[NORM]
    write_checkpoint(tmp_path / "b", weights, CONFIG)
    with pytest.raises(KeyMismatchError, match="missing"):
        diff(tmp_path / "a", tmp_path / "b")


def test_tables_are_aligned() -> None:
    assert as_table([("name", "n"), ("a", "100"), ("longer", "7")]) == "name      n\na       100\nlonger    7"

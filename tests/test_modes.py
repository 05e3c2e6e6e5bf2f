"""What torch is doing is seen: tracing of each kind, and the type that autocast computes in."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from openllama.modes import autocast_dtype, can_read_values, compute_dtype, is_traced, is_transformed

X = torch.ones(2, 3)


def test_an_ordinary_tensor_is_not_traced_and_can_be_read():
    assert not is_traced(X)
    assert not is_transformed(X)
    assert can_read_values(X)
    assert can_read_values(torch.ones(2, requires_grad=True))
    assert can_read_values(torch.nn.Parameter(torch.ones(2)))


def test_on_the_meta_device_nothing_is_traced_but_there_is_nothing_to_read():
    assert not is_traced(X.to("meta"))
    assert not can_read_values(X.to("meta"))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.grad(f),
        lambda f: torch.func.vmap(f),
        lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
        lambda f: torch.func.functionalize(f),
    ],
)
def test_torch_func_is_seen_in_the_tensors_it_wraps(transform):
    seen: list[bool] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(is_traced(torch.ones(1), x) and is_transformed(torch.ones(1), x) and not can_read_values(x))
        return x.sum()

    transform(function)(torch.ones(3))
    assert seen == [True]


def test_recording_is_seen():
    seen: list[bool] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(is_traced(x))
        return x + 1

    make_fx(function)(torch.ones(2))
    torch.compile(function, backend="eager", fullgraph=False)(torch.ones(2))
    with FakeTensorMode():
        function(torch.ones(2))
    function(FakeTensorMode().from_tensor(torch.ones(2)))
    with FlopCounterMode(display=False):
        function(torch.ones(2))
    assert seen
    assert all(seen)


def test_autocast_is_seen_where_there_is_one():
    assert autocast_dtype(torch.device("cpu")) is None
    assert compute_dtype(X) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype(torch.device("cpu")) == compute_dtype(X) == torch.bfloat16
        assert compute_dtype(X.double()) == torch.float64
        assert compute_dtype(X.half()) == torch.bfloat16
        assert autocast_dtype(torch.device("meta")) is None
        assert compute_dtype(X.to("meta")) == torch.float32

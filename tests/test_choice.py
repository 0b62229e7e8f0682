"""Whose convolution runs a layer is asked once for each kind of call, and again where something differs."""

import pytest
import torch
from layers import channels_last
from torch import nn

from fastres import _C, choice, convolution, tuning

pytestmark = pytest.mark.usefixtures("small_layers")


@pytest.fixture
def asked(monkeypatch):
    calls, own = [], convolution.covered
    monkeypatch.setattr(convolution, "covered", lambda *args: calls.append(args) or own(*args))
    return calls


class Layer:
    def __init__(self, **changes):
        self.input = channels_last(torch.randn(2, 32, 8, 8))
        self.conv, self.bn = nn.Conv2d(32, 32, 3, bias=False), nn.BatchNorm2d(32)
        self.training = self.needs_grad = True
        self.stride, self.residual = (1, 1), None
        vars(self).update(changes)

    def __call__(self):
        vectors = self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias
        geometry = self.stride, (1, 1), (1, 1), 1
        rest = None, vectors, geometry, self.training, self.needs_grad
        return choice.for_ours(self.input, self.conv.weight, self.residual, *rest)


def test_it_is_asked_once(asked):
    layer, same = Layer(), Layer()
    assert layer() == same() == layer() == convolution.Geometry((1, 1), (1, 1), (1, 1))
    assert len(asked) == 1
    assert Layer(stride=[1, 1])() is not None and len(asked) == 1


DIFFERENT = {
    "memory layout": lambda: dict(input=torch.randn(2, 32, 8, 8)),
    "dtype": lambda: dict(input=channels_last(torch.randn(2, 32, 8, 8, dtype=torch.bfloat16))),
    "size": lambda: dict(input=channels_last(torch.randn(2, 32, 1, 1)), stride=(9, 9)),
    "weight": lambda: dict(conv=nn.Conv2d(32, 32, 3).double()),
    "residual": lambda: dict(residual=torch.randn(2, 32, 1, 1)),
    "stride": lambda: dict(stride=0),
}


@pytest.mark.parametrize("change", DIFFERENT.values(), ids=DIFFERENT)
def test_what_no_kernel_runs_is_not_taken_for_what_one_does(asked, change):
    assert Layer()() is not None
    assert Layer(**change())() is None and len(asked) == 2


@pytest.mark.parametrize("vector", ["weight", "bias", "running_mean", "running_var"])
def test_vectors_are_looked_at_each_time(asked, vector):
    layer = Layer()
    assert layer() is not None
    getattr(layer.bn, vector).data = torch.ones(33)
    assert layer() is None
    getattr(layer.bn, vector).data = torch.ones(64)[::2]
    assert layer() is None
    getattr(layer.bn, vector).data = torch.ones(32)
    assert layer() is not None and len(asked) == 1


def test_another_instruction_set_mode_or_number_of_threads(asked):
    layer = Layer()
    assert layer() is not None
    before, threads = _C.cpu_isa(), torch.get_num_threads()
    try:
        _C.select_cpu_isa("scalar")
        assert layer() is None
        _C.select_cpu_isa(before)
        with tuning.forcing(False):
            assert layer() is None
        torch.set_num_threads(threads + 1)
        assert layer() is not None and len(asked) == 4
    finally:
        torch.set_num_threads(threads)
        _C.select_cpu_isa(before)


def test_autocast(asked):
    layer = Layer()
    assert layer() is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer() is not None and len(asked) == 2
    with torch.autocast("cpu", torch.float16):
        assert layer() is not None and len(asked) == 3


def test_only_so_many_are_remembered(monkeypatch):
    monkeypatch.setattr(choice, "_MOST_KNOWN", 3)
    for height in range(4, 12):
        Layer(input=channels_last(torch.randn(2, 32, height, 8)))()
        assert 1 <= len(choice._known) <= 3

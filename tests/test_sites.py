"""Sites: what runs fused computes what the modules do, whoever calls it."""

import copy

import pytest
import torch
from steps import (
    BN_ARGUMENTS,
    CONV_ARGUMENTS,
    DTYPE,
    MODES,
    assert_same,
    filled,
    randn,
    run,
    set_mode,
    site,
    was_fused,
)
from torch import nn
from torch.nn import functional as F

from fastres import recording, sites
from fastres.nn import BnAddReLU2d


def composition(bn, x, residual, relu, conv=None):
    y = bn(x if conv is None else conv(x))
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


# ---------------------------------------------------------------------------------------------------------
# the same values


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bn", BN_ARGUMENTS)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_conv_bn_act_follows_every_rule_of_batch_norm(bn, mode, residual):
    stock = site(bn=BN_ARGUMENTS[bn])
    set_mode(stock, mode)
    fused = copy.deepcopy(stock)
    x, residual = randn(3, 4, 5, 7), randn(3, 6, 5, 7) if residual else None
    expected = run(stock, lambda x, r: composition(stock[1], x, r, True, conv=stock[0]), x, residual)
    with recording.record() as records:
        actual = run(fused, lambda x, r: sites.conv_bn_act(*fused, x, r, relu=True), x, residual)
    assert [r.fused for r in records] == [True] * 2
    assert_same(actual, expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", ""])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("conv", CONV_ARGUMENTS)
def test_conv_bn_act_follows_every_argument_of_conv2d(conv, residual, relu, training):
    stock = site(conv=CONV_ARGUMENTS[conv]).train(training)
    fused = copy.deepcopy(stock)
    x = randn(2, 4, 6, 9)
    residual = torch.randn_like(stock[0](x)) if residual else None
    expected = run(stock, lambda x, r: composition(stock[1], x, r, relu, conv=stock[0]), x, residual)
    actual = run(
        fused, lambda x, r: sites.conv_bn_act(fused[0], fused[1], None, x, r, relu=relu), x, residual
    )
    assert_same(actual, expected)


def test_conv_bn_act_folded_into_the_weights_is_the_same():
    stock = site(conv=CONV_ARGUMENTS["groups"]).eval()
    x = randn(2, 4, 6, 9)
    with torch.no_grad():
        residual = torch.randn_like(stock[0](x))
        torch.testing.assert_close(
            sites.conv_bn_act(*stock, x, residual, relu=True),
            composition(stock[1], x, residual, True, conv=stock[0]),
            rtol=1e-10,
            atol=1e-10,
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bn", BN_ARGUMENTS)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", ""])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_bn_act_follows_every_rule_of_batch_norm(bn, mode, relu, residual):
    stock = nn.ModuleList([filled(nn.BatchNorm2d(6, **BN_ARGUMENTS[bn], dtype=DTYPE))])
    set_mode(stock, mode)
    fused = copy.deepcopy(stock)
    x, residual = randn(3, 6, 5, 7), randn(3, 6, 5, 7) if residual else None
    expected = run(stock, lambda x, r: composition(stock[0], x, r, relu), x, residual)
    actual = run(fused, lambda x, r: sites.bn_act(fused[0], None, x, r, relu=relu), x, residual)
    assert_same(actual, expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_statistics_that_are_no_longer_tracked_stay_as_they_are(training):
    stock = site().train(training)
    stock[1].track_running_stats = False
    fused = copy.deepcopy(stock)
    x = randn(3, 4, 5, 7)
    expected = run(stock, lambda x: composition(stock[1], x, None, True, conv=stock[0]), x)
    assert_same(run(fused, lambda x: sites.conv_bn_act(*fused, x, relu=True), x), expected)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, (5, 6)),
        (nn.BatchNorm1d, (5, 6, 7)),
        (nn.BatchNorm3d, (2, 6, 3, 4, 5)),
    ],
    ids=["1d of 2", "1d of 3", "3d"],
)
def test_bn_act_takes_other_dimensions(kind, shape):
    stock = nn.ModuleList([filled(kind(6, dtype=DTYPE)), nn.ReLU()])
    fused = copy.deepcopy(stock)
    x = randn(*shape)
    expected = run(stock, lambda x: composition(stock[0], x, None, True), x)
    with recording.record() as records:
        actual = run(fused, lambda x: sites.bn_act(*fused, x, relu=True), x)
    assert records[0].fused
    assert_same(actual, expected)


@pytest.mark.parametrize("act", [None, nn.ReLU(), nn.ReLU(inplace=True)], ids=["F.relu", "ReLU", "inplace"])
def test_add_act(act):
    modules = nn.ModuleList([])
    x, residual = randn(2, 6, 5, 7), randn(2, 6, 5, 7)
    expected = run(modules, lambda x, r: F.relu(x + r), x, residual)
    assert_same(run(modules, lambda x, r: sites.add_act(act, x, r), x, residual), expected)
    assert was_fused(lambda: sites.add_act(act, x, residual))


def test_add_act_takes_what_adds():
    x = randn(2, 6, 5, 7)
    torch.testing.assert_close(sites.add_act(None, x, x[:, :, :1, :1]), F.relu(x + x[:, :, :1, :1]))
    with recording.record() as records:
        torch.testing.assert_close(sites.add_act(None, x, 0.5), F.relu(x + 0.5))
    assert records[0].reason == (None, "an addend is not a Tensor")


def test_addends_are_left_alone():
    x, residual = randn(2, 6, 5, 7), randn(2, 6, 5, 7)
    kept = x.clone(), residual.clone()
    bn = filled(nn.BatchNorm2d(6, dtype=DTYPE))
    sites.bn_act(bn, nn.ReLU(inplace=True), x, residual, relu=True)
    sites.add_act(nn.ReLU(inplace=True), x, residual)
    assert torch.equal(x, kept[0]) and torch.equal(residual, kept[1])


@pytest.mark.parametrize("shape", [(4, 64, 20, 20), (1, 1, 64, 20, 20)], ids=str)
def test_a_sum_that_broadcasts_the_batch_norm(shape):
    conv, bn = nn.Conv2d(8, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
    input, residual = torch.randn(1, 8, 20, 20), torch.randn(shape)
    expected = F.relu(copy.deepcopy(bn)(conv(input)) + residual)
    output = sites.conv_bn_act(conv, bn, None, input, residual, relu=True)
    torch.testing.assert_close(output, expected)


# ---------------------------------------------------------------------------------------------------------
# other callers


def test_a_proxy_sees_the_modules_themselves():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.relu = site()

        def forward(self, x, residual):
            x = sites.conv_bn_act(self.conv, self.bn, self.relu, x, residual, relu=True)
            x = sites.bn_act(self.bn, None, x, relu=True)
            return sites.add_act(self.relu, x, residual)

    graph = torch.fx.symbolic_trace(Net()).graph
    targets = [node.target for node in graph.nodes if node.op == "call_module"]
    assert targets == ["conv", "bn", "relu", "bn", "relu"]


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_without_a_break(training):
    stock = site().train(training)
    compiled = copy.deepcopy(stock)

    def forward(modules, x, residual):
        y = sites.conv_bn_act(*modules, x, residual, relu=True)
        y = sites.bn_act(modules[1], None, y, relu=True)
        return sites.add_act(modules[2], y, residual)

    traced = torch.compile(forward, fullgraph=True, backend="aot_eager")
    inputs = randn(2, 4, 5, 5), randn(2, 6, 5, 5)
    expected = run(stock, lambda *inputs: forward(stock, *inputs), *inputs)
    assert_same(run(compiled, lambda *inputs: traced(compiled, *inputs), *inputs), expected)


# ---------------------------------------------------------------------------------------------------------
# stock layers on demand


def test_stock_runs_every_site_as_its_modules():
    modules = site()
    own = filled(BnAddReLU2d(6, dtype=DTYPE))
    x, residual = randn(2, 4, 5, 5), randn(2, 6, 5, 5)

    def call():
        y = sites.conv_bn_act(*modules, x, residual, relu=True)
        return sites.add_act(None, own(sites.bn_act(modules[1], None, y, relu=True), residual), residual)

    with sites.stock(), recording.record() as records:
        assert not was_fused(call)
    assert was_fused(call)
    assert [r.reason for r in records] == [(None, "stock layers were asked for")] * 4

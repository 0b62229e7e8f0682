"""Sites: what runs fused computes what the modules do, and what must not be fused runs as they are."""

import copy
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
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
)
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from fastres import recording, sites
from fastres.nn import BnAddReLU2d


def composition(bn, x, residual, relu, conv=None):
    y = bn(x if conv is None else conv(x))
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


class Dispatched(TorchDispatchMode):
    """The names of the ops that reach the kernels."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def was_fused(call):
    with Dispatched() as dispatched:
        call()
    return any(name.startswith("fastres::") for name in dispatched.names)


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


def test_a_failing_convolution_counts_no_batch():
    conv, bn, act = site()
    with pytest.raises(RuntimeError, match="channels"):
        sites.conv_bn_act(conv, bn, act, randn(2, 5, 6, 6), relu=True)
    assert bn.num_batches_tracked == 0


def test_one_value_a_channel_is_batch_norms_error():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        sites.bn_act(nn.BatchNorm2d(6, dtype=DTYPE), None, randn(1, 6, 1, 1), relu=True)


def test_a_wrong_dimension_is_the_modules_error():
    conv, bn, act = site()
    with recording.record() as records, pytest.raises(ValueError, match="expected 4D input"):
        sites.conv_bn_act(conv, bn, act, randn(4, 6, 6), relu=True)
    assert records[0].reason == (conv, "the input is 3-d")
    with pytest.raises(ValueError, match="expected 4D input"):
        sites.bn_act(bn, act, randn(2, 6), relu=True)


# ---------------------------------------------------------------------------------------------------------
# fused or not


def forward_hook(conv, bn, act):
    bn.register_forward_hook(lambda module, inputs, output: output * 2)
    return bn, "a forward hook is set"


def forward_pre_hook(conv, bn, act):
    conv.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    return conv, "a forward pre-hook is set"


def full_backward_hook(conv, bn, act):
    act.inplace = False
    act.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,))
    return act, "a backward hook is set"


def full_backward_pre_hook(conv, bn, act):
    act.inplace = False
    bn.register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 2,))
    return bn, "a backward pre-hook is set"


def global_forward_hook(conv, bn, act):
    module_hooks.register_module_forward_hook(lambda module, inputs, output: output * 2)
    return None, "a global module hook is set"


def global_forward_pre_hook(conv, bn, act):
    module_hooks.register_module_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    return None, "a global module hook is set"


def global_backward_hook(conv, bn, act):
    act.inplace = False
    module_hooks.register_module_full_backward_hook(
        lambda module, inputs, outputs: tuple(None if i is None else i * 2 for i in inputs)
    )
    return None, "a global module hook is set"


def replaced_forward(conv, bn, act):
    bn.forward = lambda x: x * 2
    return bn, "forward was replaced"


def replaced_conv_forward(conv, bn, act):
    original = conv._conv_forward
    conv._conv_forward = lambda *args: original(*args) * 2
    return conv, "forward was replaced"


def compiled(conv, bn, act):
    conv.compile(backend="eager")
    return conv, "compile() was called"


def subclass(conv, bn, act):
    conv.__class__ = type(
        "MyConv2d", (nn.Conv2d,), {"forward": lambda self, x: nn.Conv2d.forward(self, x) * 2}
    )
    return conv, "MyConv2d instead of nn.Conv2d"


def another_activation(conv, bn, act):
    act.__class__ = nn.Hardswish
    return act, "Hardswish instead of nn.ReLU"


def reflect(conv, bn, act):
    conv.__init__(4, 6, 3, padding=1, padding_mode="reflect", dtype=DTYPE)
    return conv, "padding_mode 'reflect' is set"


def parametrized_weight_norm(conv, bn, act):
    parametrizations.weight_norm(conv)
    return conv, "ParametrizedConv2d instead of nn.Conv2d"


def parametrized_batch_norm(conv, bn, act):
    parametrize.register_parametrization(bn, "weight", nn.Softplus())
    return bn, "ParametrizedBatchNorm2d instead of nn.BatchNorm2d"


@pytest.fixture
def no_global_hooks():
    yield
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    ):
        getattr(module_hooks, name).clear()
    module_hooks._global_is_full_backward_hook = None


@pytest.mark.parametrize(
    "hinder",
    [
        forward_hook,
        forward_pre_hook,
        full_backward_hook,
        full_backward_pre_hook,
        global_forward_hook,
        global_forward_pre_hook,
        global_backward_hook,
        replaced_forward,
        replaced_conv_forward,
        compiled,
        subclass,
        another_activation,
        reflect,
        parametrized_weight_norm,
        parametrized_batch_norm,
    ],
    ids=lambda hinder: hinder.__name__,
)
@pytest.mark.usefixtures("no_global_hooks")
def test_what_stands_in_the_way_is_named_and_runs_as_it_is(hinder):
    torch.manual_seed(1)
    modules = site()
    torch.manual_seed(1)
    twin = site()
    hinder(*twin)
    for hooks in (module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks):
        hooks.clear()
    module_hooks._global_backward_hooks.clear()
    x, residual = randn(3, 4, 5, 7), randn(3, 6, 5, 7)
    assert was_fused(lambda: sites.conv_bn_act(*copy.deepcopy(modules), x, residual, relu=True))

    torch.manual_seed(7)  # where it draws weights
    culprit, text = hinder(*modules)
    twin.load_state_dict(modules.state_dict())
    expected = run(twin, lambda x, r: twin[2](twin[1](twin[0](x)) + r), x, residual)
    with recording.record() as records:
        actual = run(modules, lambda x, r: sites.conv_bn_act(*modules, x, r, relu=True), x, residual)
    assert_same(actual, expected)
    assert not was_fused(lambda: sites.conv_bn_act(*modules, x, residual, relu=True))
    for record in records:
        assert record.modules == tuple(modules) and record.ran == "conv_bn_add_relu" and not record.fused
        assert record.reason[0] is culprit and record.reason[1] == text
    assert sites.why_not(*modules)[0] is culprit
    if "instead of" not in text:  # what it is instead of is the site's to know
        assert sites.why_not(*modules)[1] == text


def test_removing_the_hook_fuses_again():
    modules, x = site(), randn(2, 4, 5, 5)
    handle = modules[1].register_forward_hook(lambda *_: None)
    assert not was_fused(lambda: sites.conv_bn_act(*modules, x, relu=True))
    handle.remove()
    assert was_fused(lambda: sites.conv_bn_act(*modules, x, relu=True))
    assert sites.why_not(*modules) is None


@pytest.mark.parametrize("place", [0, 1])
def test_a_hook_in_a_bn_act_site(place):
    modules = nn.ModuleList([filled(nn.BatchNorm2d(4, dtype=DTYPE)), nn.ReLU()])
    modules[place].register_forward_hook(lambda module, inputs, output: output * 2)
    x = randn(2, 4, 5, 5)
    expected = modules[1](modules[0](x) + x)
    with recording.record() as records:
        torch.testing.assert_close(sites.bn_act(*modules, x, x, relu=True), expected, rtol=0, atol=0)
    assert records[0].reason == (modules[place], "a forward hook is set")


def test_a_hook_in_an_add_act_site():
    act, x = nn.ReLU(), randn(2, 4)
    act.register_forward_hook(lambda module, inputs, output: output * 2)
    with recording.record() as records:
        torch.testing.assert_close(sites.add_act(act, x, x), F.relu(x + x) * 2, rtol=0, atol=0)
    assert records[0].reason == (act, "a forward hook is set")


def test_sync_batch_norm_is_left():
    conv, _, act = site()
    bn = filled(nn.SyncBatchNorm(6, dtype=DTYPE)).eval()  # which trains on GPUs only
    x = randn(2, 4, 5, 5)
    with recording.record() as records:
        output = sites.conv_bn_act(conv, bn, act, x, relu=True)
    torch.testing.assert_close(output, F.relu(bn(conv(x))), rtol=0, atol=0)
    assert records[0].reason == (bn, "SyncBatchNorm instead of nn.BatchNorm2d")


def test_why_not_passes_none_over_and_names_the_first():
    conv, bn, act = site()
    assert sites.why_not(conv, bn, None, act) is None
    assert sites.why_not(nn.BatchNorm1d(2), nn.BatchNorm3d(2)) is None
    pool, norm = nn.MaxPool2d(2), nn.GroupNorm(1, 2)
    module, text = sites.why_not(conv, pool, norm)
    assert module is pool and text.startswith("MaxPool2d instead of nn.Conv2d or nn.BatchNorm2d or ")


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


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_counts_batches_as_stock_does(use_reentrant):
    stock = site()
    fused = copy.deepcopy(stock)
    checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=use_reentrant)
    x = randn(2, 4, 5, 5)
    expected = run(stock, lambda x: checkpoint(lambda x: stock[2](stock[1](stock[0](x))), x), x)
    assert_same(
        run(fused, lambda x: checkpoint(lambda x: sites.conv_bn_act(*fused, x, relu=True), x), x), expected
    )


@pytest.mark.parametrize("shape", [(4, 64, 20, 20), (1, 1, 64, 20, 20)], ids=str)
def test_a_sum_that_broadcasts_the_batch_norm(shape):
    conv, bn = nn.Conv2d(8, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
    input, residual = torch.randn(1, 8, 20, 20), torch.randn(shape)
    expected = F.relu(copy.deepcopy(bn)(conv(input)) + residual)
    output = sites.conv_bn_act(conv, bn, None, input, residual, relu=True)
    torch.testing.assert_close(output, expected)


REFUSED = {
    "double": lambda conv, x: x.double(),
    "bf16": lambda conv, x: x.bfloat16(),
    "integers": lambda conv, x: x.long(),
    "a small image": lambda conv, x: x[..., :1, :1],
    "channels": lambda conv, x: x[:, :5],
    "stride": lambda conv, x: setattr(conv, "stride", (0, 0)) or x,
    "padding": lambda conv, x: setattr(conv, "padding", (-1, -1)) or x,
    "dilation": lambda conv, x: setattr(conv, "dilation", (0, 0)) or x,
    "groups": lambda conv, x: setattr(conv, "groups", 3) or x,
    "weight": lambda conv, x: setattr(conv.weight, "data", conv.weight.data[0]) or x,
}


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_a_batch_that_stock_refuses_is_not_counted(change, layout):
    """As in stock, where the convolution refuses it before the batch norm sees it."""
    conv, bn = nn.Conv2d(8, 64, 3, bias=False), nn.BatchNorm2d(64)
    input = change(conv, torch.randn(4, 8, 20, 20).contiguous(memory_format=layout))
    with pytest.raises(Exception) as stock:
        bn(conv(input))
    with pytest.raises(type(stock.value)):
        sites.conv_bn_act(conv, bn, None, input, relu=True)
    assert bn.num_batches_tracked == 0
    assert torch.equal(bn.running_mean, torch.zeros(64)) and torch.equal(bn.running_var, torch.ones(64))


def test_a_batch_is_counted_whose_sum_is_refused():
    """As in stock, where the batch norm has updated its statistics by then."""
    stock, bn = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    input, residual = torch.randn(4, 8, 6, 6), torch.randn(4, 8, 5, 5)
    with pytest.raises(RuntimeError, match="must match"):
        stock(input) + residual
    with pytest.raises(RuntimeError, match="must match"):
        sites.bn_act(bn, None, input, residual, relu=False)
    assert bn.num_batches_tracked == stock.num_batches_tracked == 1
    torch.testing.assert_close(bn.running_mean, stock.running_mean)

"""Sites: what must not be fused is named, and runs as it is."""

import copy

import pytest
import torch
from steps import DTYPE, assert_same, filled, randn, run, site, was_fused
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrizations, parametrize

from fastres import recording, sites


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

"""What sites tell of their calls: what ran, whether by a kernel, and why not."""

import contextlib

import pytest
import torch
from steps import (
    randn,
    site,
)

from fastres import recording, sites


def test_records_say_what_ran():
    conv, bn, act = site()
    x, residual = randn(2, 4, 5, 5), randn(2, 6, 5, 5)
    with recording.record() as records:
        sites.conv_bn_act(conv, bn, act, x, relu=True)
        sites.conv_bn_act(conv, bn, None, x, residual, relu=True)
        sites.conv_bn_act(conv, bn, None, x, relu=False)
        sites.conv_bn_act(conv, bn, None, x, residual, relu=False)
        sites.bn_act(bn, act, residual, relu=True)
        sites.bn_act(bn, act, residual, residual, relu=True)
        sites.bn_act(bn, None, residual, relu=False)
        sites.bn_act(bn, None, residual, residual, relu=False)
        sites.add_act(act, residual, residual)
        sites.add_act(None, residual, residual)
    told = [(record.modules, record.ran, record.fused, record.reason) for record in records]
    assert told == [
        ((conv, bn, act), "conv_bn_relu", True, None),
        ((conv, bn), "conv_bn_add_relu", True, None),
        ((conv, bn), "conv_bn", True, None),
        ((conv, bn), "conv_bn_add", True, None),
        ((bn, act), "bn_relu", True, None),
        ((bn, act), "bn_add_relu", True, None),
        ((bn,), "bn", True, None),
        ((bn,), "bn_add", True, None),
        ((act,), "add_relu", True, None),
        ((), "add_relu", True, None),
    ]


# What no kernel takes, how to get there from a site and its input, and words of the reason.
COMPOSED = {
    "strided": (lambda bn, x: bn_act(bn, x[..., ::2]), "neither contiguous nor channels_last"),
    "dtype": (lambda bn, x: bn_act(bn.float(), x), "another dtype"),
    "complex": (lambda bn, x: bn_act(bn, x.to(torch.complex64)), "no kernel for complex64 on cpu"),
    "residual": (lambda bn, x: bn_act(bn, x, x[:1]), "another shape"),
    "sum": (lambda bn, x: sites.add_act(None, x, x.float()), "another shape, dtype"),
    "sum's layout": (
        lambda bn, x: sites.add_act(None, x, x.contiguous(memory_format=torch.channels_last)),
        "another memory layout",
    ),
}  # fmt: skip


def bn_act(bn, x, residual=None):
    return sites.bn_act(bn, None, x, residual, relu=True)


@pytest.mark.parametrize("how, words", COMPOSED.values(), ids=COMPOSED)
def test_records_tell_when_no_kernel_ran(how, words):
    _, bn, _ = site()
    x = randn(2, 6, 5, 6)
    with recording.record() as records, contextlib.suppress(RuntimeError):  # stock's, of mixed dtypes
        bn_act(bn, x)
        how(bn, x)
    assert (records[0].fused, records[0].reason) == (True, None)
    assert not records[1].fused and words in records[1].reason[1]


def test_few_values_run_by_pytorch(few_values, monkeypatch):
    monkeypatch.undo()
    _, bn, act = site()
    bn.eval()
    x = randn(1, 6, few_values // 6 + 1, 1)
    with recording.record() as records:
        sites.bn_act(bn, act, x[:, :, 1:].contiguous(), relu=True)
        sites.bn_act(bn, act, x, relu=True)
        sites.add_act(act, x, x)
        sites.add_act(act, x[:, :, 1:].contiguous(), x[:, :, 1:].contiguous())
    assert [record.fused for record in records] == [False, True, True, False]
    assert "PyTorch's own operations are as fast" in records[0].reason[1]


def test_records_nest_and_end_with_their_context():
    x = randn(2, 4)
    with recording.record() as outer:
        sites.add_act(None, x, x)
        with recording.record() as inner, pytest.raises(KeyError):
            sites.add_act(None, x, x)
            raise KeyError
        sites.add_act(None, x, x)
    sites.add_act(None, x, x)
    assert (len(outer), len(inner)) == (2, 1)

"""Sites: which batches are refused and which are counted, as in stock PyTorch."""

import copy
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from steps import DTYPE, assert_same, randn, run, site
from torch import nn

from fastres import recording, sites


def test_a_failing_convolution_counts_no_batch():
    conv, bn, act = site()
    with pytest.raises(RuntimeError, match="channels"):
        sites.conv_bn_act(conv, bn, act, randn(2, 5, 6, 6), relu=True)
    assert bn.num_batches_tracked == 0


def test_one_value_a_channel_is_batch_norms_error():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        sites.bn_act(nn.BatchNorm2d(6, dtype=DTYPE), None, randn(1, 6, 1, 1), relu=True)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_a_batch_that_the_batch_norm_refuses_is_counted(layout):
    """As in stock, which counts it before it looks at it."""
    stock = nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64)
    input = torch.randn(1, 32, 3, 3).contiguous(memory_format=layout)
    fused = copy.deepcopy(stock)
    for conv, bn, call in (
        (*stock, lambda conv, bn: bn(conv(input))),
        (*fused, lambda conv, bn: sites.conv_bn_act(conv, bn, None, input, relu=True)),
        (None, fused[1], lambda _, bn: sites.bn_act(bn, None, torch.randn(1, 64, 1, 1), relu=True)),
    ):
        before = int(bn.num_batches_tracked)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            call(conv, bn)
        assert bn.num_batches_tracked == before + 1


def test_a_wrong_dimension_is_the_modules_error():
    conv, bn, act = site()
    with recording.record() as records, pytest.raises(ValueError, match="expected 4D input"):
        sites.conv_bn_act(conv, bn, act, randn(4, 6, 6), relu=True)
    assert records[0].reason == (conv, "the input is 3-d")
    with pytest.raises(ValueError, match="expected 4D input"):
        sites.bn_act(bn, act, randn(2, 6), relu=True)


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

"""Whose convolution runs a layer on the CPU, ours or PyTorch's."""

import torch

from fastres import _C, cases, convolution, kernels, tuning
from fastres.packing import is_kept


def for_ours(
    input, weight, residual, conv_bias, channel_vectors, geometry, training: bool, needs_grad: bool
) -> convolution.Geometry | None:
    """The geometry, if our convolution runs the layer and is the faster one: as measured, or by rule."""
    if not torch.compiler.is_dynamo_compiling() and (
        cases.is_traced() or cases.is_special(input, weight, residual, conv_bias, *channel_vectors)
    ):
        return None
    by = convolution.covered(input, weight, residual, *geometry)
    if by is None:
        return None
    dtype = convolution.compute_dtype(input)
    if cases.why_not_channels(weight.size(0), dtype, input.device, *channel_vectors, conv_bias) is not None:
        return None
    faster = convolution.expected_faster(by, input, weight, needs_grad)
    if torch.compiler.is_dynamo_compiling():
        return by if faster else None
    kept = not training and is_kept(weight)
    if not training and not kept:
        faster = faster and convolution.pays_packing(by, input, weight)
    if tuning.knows():
        layer = tuning.Layer(
            training,
            _name(dtype),
            _name(weight.dtype),
            tuple(input.shape),
            tuple(weight.shape),
            *by,
            residual is not None,
            needs_grad,
            needs_grad and input.requires_grad,
            kept,
            torch.get_num_threads(),
        )
        faster = tuning.takes_ours(layer, faster)
    return by if faster else None


def state() -> tuple:
    """What a choice holds for besides a layer's sizes and dtypes: with another state it may be another."""
    return torch.get_num_threads(), _C.cpu_isa(), kernels.few_values, *tuning.state()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

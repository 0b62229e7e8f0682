"""Whose convolution runs a layer on the CPU, ours or PyTorch's."""

import torch

from fastres import _C, cases, convolution, kernels, tuning
from fastres.packing import is_kept

# What was answered before, by all that it depends on: to ask takes as long as a layer of few values.
_known: dict[tuple, convolution.Geometry | None] = {}
_MOST_KNOWN = 4096


def for_ours(
    input, weight, residual, conv_bias, channel_vectors, geometry, training: bool, needs_grad: bool
) -> convolution.Geometry | None:
    """The geometry, if our convolution runs the layer and is the faster one: as measured, or by rule."""
    vectors = *channel_vectors, conv_bias
    if torch.compiler.is_dynamo_compiling():
        by = convolution.covered(input, weight, residual, *geometry)
        faster = by is not None and convolution.expected_faster(by, input, weight, needs_grad)
        return by if faster and _fit(input, weight, vectors) else None
    if cases.is_traced() or cases.is_special(input, weight, residual, *vectors):
        return None
    kept = not training and is_kept(weight)
    geometry = tuple(tuple(each) if type(each) is list else each for each in geometry)
    kind = (
        kind_of(input),
        kind_of(weight),
        None if residual is None else kind_of(residual),
        geometry,
        training,
        needs_grad,
        kept,
        state(),
    )
    by = _known.get(kind, _known)
    if by is _known:
        by = _asked(input, weight, residual, geometry, training, needs_grad, kept)
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[kind] = by
    return by if by is not None and _fit(input, weight, vectors) else None


def kind_of(tensor) -> tuple:
    """What of a tensor a choice depends on."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _fit(input, weight, vectors) -> bool:
    dtype = convolution.compute_dtype(input)
    return cases.why_not_channels(weight.size(0), dtype, input.device, *vectors) is None


def _asked(input, weight, residual, geometry, training, needs_grad, kept) -> convolution.Geometry | None:
    by = convolution.covered(input, weight, residual, *geometry)
    if by is None:
        return None
    faster = convolution.expected_faster(by, input, weight, needs_grad)
    if not training and not kept:
        faster = faster and convolution.pays_packing(by, input, weight)
    if tuning.knows():
        layer = tuning.Layer(
            training,
            _name(convolution.compute_dtype(input)),
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
    """What a choice holds for besides a layer's tensors: with another state it may be another."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    return autocast, torch.get_num_threads(), _C.cpu_isa(), kernels.few_values, *tuning.state()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Models that only infer."""

import torch
from torch import Tensor, nn

from fastres.fuse import fuse
from fastres.packing import keep_packed
from fastres.sequences import run_in_sequences


def optimize_for_inference(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Fuse a model for inference alone, on the CPU.

    It is put into evaluation mode and channels_last memory, its parameters need no gradient any more, and
    the weights of its convolutions are kept a second time, in the order in which they are multiplied. That
    is made at the first call, and anew after a change that autograd sees: load_state_dict, an optimizer, an
    in-place operation, but not one on `weight.data`. A weight that is replaced by another Parameter, or
    that was made in torch.inference_mode(), is packed at each call. Results and state_dict are those of
    `fuse(model).eval()`. Images in channels_last memory are the faster ones, too.

    Where the forward can be traced, convolutions that follow each other are called as one: without Python
    between them, and with memory that goes from one to the next. That is made anew for each shape of
    inputs, of which the last few are kept, and after any change of the model: hooks, replaced modules,
    attributes, loaded or cast parameters.

    Args:
        model: any module.
        inplace: change `model` itself instead of a deep copy of it.

    Returns:
        The model; `model` itself if `inplace`. Copies of it pack their weights at each call, like fuse's.

    Raises:
        TypeError: if `model` is no torch.nn.Module.
    """
    model = fuse(model, inplace=inplace).eval().requires_grad_(False)
    model._apply(_in_channels_last)  # Module.to() would refuse a model that has volumes as well
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            keep_packed(module.weight)
    run_in_sequences(model)
    return model


def _in_channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

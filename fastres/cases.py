"""Which cases the kernels cover: of the others fastres.ops composes PyTorch's own operations.

A function that begins with why gives the reason in words, None if there is none.
"""

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.autograd import forward_ad
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastres import kernels
from fastres.kernels import accumulation_dtype, is_channels_last

_CUDA_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
_CPU_DTYPES = _CUDA_DTYPES | {torch.float64}
_PLAIN = {Tensor, torch.nn.Parameter}


def is_traced() -> bool:
    """Whether somebody records ops, and is to see this one before its autograd."""
    return (
        torch.compiler.is_dynamo_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or _len_torch_dispatch_stack_pre_dispatch() > 0
    )


def is_special(*tensors: Tensor | None) -> bool:
    """Whether only PyTorch's own ops know what to do: tensor subclasses, torch.func, forward-mode AD.

    Or a trace of torch.jit, which somebody without fastres may read, or which becomes an ONNX file.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    if torch._C._get_tracing_state() is not None:
        return True
    if peek_interpreter_stack() is not None or has_torch_function(tensors):
        return True
    dual = forward_ad._current_level >= 0
    for tensor in tensors:
        if tensor is None:
            continue
        if dual and forward_ad.unpack_dual(tensor).tangent is not None:
            return True
        if type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor):
            return True
    return False


def surely(condition: bool | torch.SymBool) -> bool:
    """Of sizes: whether that holds for all of those that a graph with open ones is made for."""
    if not torch.compiler.is_dynamo_compiling() and type(condition) is bool:
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def why_no_kernel(input: Tensor, *others: Tensor | None) -> str | None:
    """Why no kernel takes this activation; None if one does. `others` are only looked at for their kind."""
    device = input.device.type
    if (  # first, as of so few values these questions take a part of the time
        device == "cpu"
        and not torch.compiler.is_dynamo_compiling()
        and surely(input.numel() <= kernels.few_values)
        and input.numel() > 0
    ):
        return f"PyTorch's own operations are as fast on up to {kernels.few_values} values"
    if is_special(input, *others):
        return "a tensor subclass, a transform of torch.func, forward-mode AD or torch.jit.trace is at work"
    if not (device == "cpu" or (device == "cuda" and kernels.runs_on_card(input.device.index))):
        card = " of this compute capability" if device == "cuda" and kernels.CUDA else ""
        return f"there are no kernels for {device}{card} in this build"
    if input.dtype not in (_CPU_DTYPES if device == "cpu" else _CUDA_DTYPES):
        return f"there is no kernel for {str(input.dtype).removeprefix('torch.')} on {device}"
    if input.layout != torch.strided or not 2 <= input.dim() <= 5 or input.numel() == 0:
        return "the input is empty, sparse, or not of 2 to 5 dimensions"
    if not (input.is_contiguous() or is_channels_last(input)):
        return "the input is neither contiguous nor channels_last"
    return None


def why_not_channels(channels: int, dtype: torch.dtype, device: torch.device, *vectors) -> str | None:
    """Why the vectors, None or not, are not per-channel ones of an activation of `dtype`."""
    dtypes = dtype, accumulation_dtype(dtype)
    for vector in vectors:
        if vector is not None and not (
            vector.dim() == 1
            and vector.size(0) == channels
            and vector.dtype in dtypes
            and vector.device == device
            and vector.is_contiguous()
        ):
            return "a parameter or running statistic has another dtype, device, size or stride"
    return None


def why_not_residual(residual: Tensor | None, input: Tensor) -> str | None:
    if residual is None or (
        residual.shape == input.shape and residual.dtype == input.dtype and residual.device == input.device
    ):
        return None
    return "what is added has another shape, dtype or device"


def why_not_statistics(
    input: Tensor, running_mean, running_var, training: bool, momentum, eps
) -> str | None:
    if training and input.numel() <= input.size(1):
        return "there is one value a channel"
    if not training and (running_mean is None or running_var is None):
        return "there are no running statistics"
    return why_pytorch_refuses(running_mean, running_var, training, momentum, eps)


def why_pytorch_refuses(running_mean, running_var, training: bool, momentum, eps) -> str | None:
    """What F.batch_norm is left to complain about."""
    if eps < 0 or (training and eps <= 0):
        return "eps is not positive"
    if any(t is not None and t.requires_grad for t in (running_mean, running_var)):
        return "a running statistic requires a gradient"
    if training and (running_mean is None) != (running_var is None):
        return "there is one running statistic without the other"
    return None if isinstance(momentum, (int, float)) else "momentum is not a number"

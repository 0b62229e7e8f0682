"""The fused ops beside stock PyTorch's composition of the same, and a copy, on the same tensors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

import fastres.ops  # noqa: F401  (registers the kernels)

# Outputs of convolutions in ResNet-50 at 224x224, (channels, height, width). The first two are its largest.
LARGE = [(64, 112, 112), (256, 56, 56)]
OTHERS = [
    (64, 56, 56),
    (128, 28, 28),
    (512, 28, 28),
    (256, 14, 14),
    (1024, 14, 14),
    (512, 7, 7),
    (2048, 7, 7),
]


@dataclass
class Case:
    """One op in one direction; the fused one reads or writes `passes` tensors of input's size."""

    op: str
    direction: str
    passes: int
    fused: Callable[[], object]
    stock: Callable[[], object]


def input_of(
    batch: int, size: tuple[int, int, int], dtype: torch.dtype, channels_last: bool, device: torch.device
) -> torch.Tensor:
    memory = torch.channels_last if channels_last else torch.contiguous_format
    return torch.randn(batch, *size, device=device).to(dtype).contiguous(memory_format=memory)


def copies(input: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Into a fresh tensor, as the ops write theirs, and into one that is there already; 2 passes each."""
    warm = torch.empty_like(input)
    return {"fresh": input.clone, "warm": lambda: warm.copy_(input)}


def cases(input: torch.Tensor) -> list[Case]:
    kernels, aten = torch.ops.fastres, torch.ops.aten
    channels, device = input.size(1), input.device
    residual, grad = torch.randn_like(input), torch.randn_like(input)
    statistics = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    weight = torch.rand(channels, device=device) + 0.5
    bias = torch.randn(channels, device=device)

    def fused_forward(residual):
        return kernels.bn_act_forward(input, residual, *statistics, weight, bias, True, 0.1, 1e-5, True)

    def stock_forward(residual):
        # What torch.nn.functional.batch_norm calls: it chooses between PyTorch's own kernel and cuDNN's.
        output, *saved = torch._batch_norm_impl_index(
            input, weight, bias, *statistics, True, 0.1, 1e-5, torch.backends.cudnn.enabled
        )
        if residual is not None:
            output += residual
        return torch.relu_(output), *saved

    def fused_backward(output, saved):
        return lambda: kernels.bn_act_backward(grad, input, output, weight, bias, *saved, True, True)

    def stock_backward(output, saved):
        mean, rstd, reserve, implementation = saved

        def run():
            masked = aten.threshold_backward(grad, output, 0)
            gradients = aten._batch_norm_impl_index_backward(
                implementation,
                input,
                masked,
                weight,
                *statistics,
                mean,
                rstd,
                True,
                1e-5,
                [True] * 3,
                reserve,
            )
            return masked, gradients

        return run

    _, *fused_saved = fused_forward(None)
    output, *stock_saved = stock_forward(None)
    sum_output, *_ = stock_forward(residual)
    return [
        Case("bn_relu", "forward", 3, lambda: fused_forward(None), lambda: stock_forward(None)),
        Case(
            "bn_relu", "backward", 5, fused_backward(None, fused_saved), stock_backward(output, stock_saved)
        ),
        Case("bn_add_relu", "forward", 4, lambda: fused_forward(residual), lambda: stock_forward(residual)),
        Case(
            "bn_add_relu",
            "backward",
            7,
            fused_backward(sum_output, fused_saved),
            stock_backward(sum_output, stock_saved),
        ),
        Case(
            "add_relu",
            "forward",
            3,
            lambda: kernels.add_relu_forward(input, residual),
            lambda: torch.relu_(input + residual),
        ),
        Case(
            "add_relu",
            "backward",
            3,
            lambda: kernels.add_relu_backward(grad, output),
            lambda: aten.threshold_backward(grad, output, 0),
        ),
    ]

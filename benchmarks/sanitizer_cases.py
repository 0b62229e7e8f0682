"""Each kernel once a dtype, layout and kind of shape, for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitizer_cases.py

The variable gives each tensor an allocation of its own, so that what lies past its end belongs to nobody.
Inputs are drawn on the host, so that no other kernel writes what ours read.
"""

import argparse
from itertools import product

import torch

from fastres import _C, ops  # ops registers the kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
SHAPES = [
    (2, 3, 5, 7),  # less than a vector
    (3, 130, 3, 3),  # whole vectors and a rest
    (8, 64, 28, 28),  # several blocks a channel
]
KERNELS = torch.ops.fastres


def run(shape, dtype, layout, device) -> list[torch.Tensor]:
    """Everything that the kernels write in one case."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def activation():
        return draw(*shape).to(dtype).contiguous(memory_format=layout).to(device)

    input, other, grad = (activation() for _ in range(3))
    weight, bias, running_mean = (draw(shape[1]).to(device) for _ in range(3))
    running_var = (draw(shape[1]).square() + 0.5).to(device)
    written = [running_mean, running_var]
    for residual, training, relu in product((None, other), (True, False), (True, False)):
        output, *saved = KERNELS.bn_act_forward(
            input, residual, running_mean, running_var, weight, bias, training, 0.1, 1e-5, relu
        )
        kept = output if relu and residual is not None else None
        written += output, *saved
        written += KERNELS.bn_act_backward(grad, input, kept, weight, bias, *saved, training, relu)
    if layout == torch.channels_last:
        # ResNet's windows, and of a kernel that is not compiled for its size.
        for kernel, stride, padding in ((3, 2, 1), (2, 1, 0)):
            size = [(side + 2 * padding - kernel) // stride + 1 for side in shape[2:]]
            window = [kernel] * 2, [stride] * 2, [padding] * 2
            for training in (True, False):
                output, index, *saved = KERNELS.bn_relu_max_pool_forward(
                    input, running_mean, running_var, weight, bias, training, 0.1, 1e-5, size, *window
                )
                written += output, index, *saved
                written += KERNELS.bn_relu_max_pool_backward(
                    torch.ones_like(output), input, index, weight, bias, *saved, training, *window
                )
    output = ops.add_relu(input, other)
    return [*written, output, KERNELS.add_relu_backward(grad, output)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    device = parser.parse_args().device
    cases = list(product((0,), SHAPES, DTYPES, LAYOUTS))
    if device == "cuda":  # batch norms in one launch, too
        cases += product((1,), SHAPES, [torch.bfloat16], LAYOUTS)
    for on_chip, *case in cases:
        if device == "cuda":
            _C.use_on_chip(on_chip)
        for tensor in run(*case, device):
            # Copied whole, so that initcheck sees an element that no kernel wrote.
            assert tensor.cpu().isfinite().all(), f"not finite: {case}, on chip: {on_chip}"
    print(f"{len(cases)} cases on {device}")


if __name__ == "__main__":
    main()

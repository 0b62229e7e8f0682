"""A few training steps of two modules in float64: all that they leave behind has to be equal."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

DTYPE = torch.float64

BN_ARGUMENTS = {
    "default": {},
    "momentum=None": {"momentum": None},
    "momentum=0.7, eps=0.1": {"momentum": 0.7, "eps": 0.1},
    "affine=False": {"affine": False},
    "track_running_stats=False": {"track_running_stats": False},
    "momentum=None, track_running_stats=False": {"momentum": None, "track_running_stats": False},
}
CONV_ARGUMENTS = {
    "3x3": {"kernel_size": 3, "padding": 1, "bias": False},
    "1x1 of stride 2": {"kernel_size": 1, "stride": 2, "bias": False},
    "bias, padding=0": {"kernel_size": 3},
    "groups": {"kernel_size": 3, "padding": (1, 0), "groups": 2, "stride": (1, 2)},
    "same, dilated": {"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1)},
    "valid": {"kernel_size": 2, "padding": "valid"},
}
MODES = ["train", "eval", "frozen"]


def randn(*shape):
    return torch.randn(*shape, dtype=DTYPE)


def filled(module):
    """The module with factors and statistics of its batch norms that are not their initial ones."""
    with torch.no_grad():
        for bn in module.modules():
            if isinstance(bn, _BatchNorm):
                for name, tensor in [*bn.named_parameters(), *bn.named_buffers()]:
                    if tensor.is_floating_point():
                        tensor.copy_(torch.rand_like(tensor) + 0.5 * (name == "running_var"))
    return module


def set_mode(module, mode):
    """train, eval, or train with frozen batch norms."""
    module.train(mode != "eval")
    if mode == "frozen":
        for bn in module.modules():
            if isinstance(bn, _BatchNorm):
                bn.eval().requires_grad_(False)
    return module


def run(module: nn.Module, forward, *inputs, steps=2):
    """Output, gradients and buffers, by name, after `steps` forwards and backwards."""
    inputs = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    module.zero_grad()
    for step in range(steps):
        output = forward(*(None if x is None else x * (1 + step) for x in inputs))
        (
            output * torch.arange(output.numel(), dtype=output.dtype).view(output.shape).cos()
        ).sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    gradients |= {f"gradient of input {i}": x.grad for i, x in enumerate(inputs) if x is not None}
    return {"output": output.detach(), **gradients, **dict(module.named_buffers())}


def assert_same(actual, expected):
    """To 1e-10 of the largest value; of the largest of all gradients, where it is a gradient.

    (That of a bias before a batch norm is 0 but for rounding.)
    """
    assert list(actual) == list(expected)
    gradients = [
        g.abs().max().item() for name, g in expected.items() if "gradient" in name and g is not None
    ]
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
            continue
        largest = max(gradients) if "gradient" in name else value.abs().max().item()
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=1e-10,
            atol=1e-10 * largest,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def site(conv=None, bn=None):
    """Convolution, batch norm with parameters and statistics that are not their initial ones, and ReLU."""
    conv = nn.Conv2d(4, 6, **(conv or CONV_ARGUMENTS["3x3"]), dtype=DTYPE)
    bn = filled(nn.BatchNorm2d(6, **(bn or {}), dtype=DTYPE))
    return nn.ModuleList([conv, bn, nn.ReLU(inplace=True)])


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

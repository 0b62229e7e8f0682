"""csrc/cuda's kernels on tensors in host memory, through csrc/emu; it is built on first use.

Every output is poisoned with NaN before the call, and so is the workspace.
"""

import contextlib
import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


# The structs of csrc/core/batch_norm.h, field by field.
class Activation(Structure):
    _fields_ = [(n, c_int64) for n in ("batch", "channels", "pixels")] + [
        ("channels_last", c_bool),
        ("dtype", c_int),
    ]


class ChannelVector(Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int)]


class BnForward(Structure):
    _fields_ = (
        [("shape", Activation)]
        + [(n, c_void_p) for n in ("input", "residual", "output")]
        + [(n, ChannelVector) for n in ("weight", "bias", "running_mean", "running_var")]
        + [(n, c_void_p) for n in ("save_mean", "save_rstd")]
        + [("statistics", c_int), ("moments", c_void_p)]
        + [("relu", c_bool), ("momentum", c_double), ("eps", c_double)]
    )


class BnBackward(Structure):
    _fields_ = (
        [("shape", Activation)]
        + [(n, c_void_p) for n in ("grad", "input", "output")]
        + [(n, ChannelVector) for n in ("weight", "bias")]
        + [
            (n, c_void_p)
            for n in ("save_mean", "save_rstd", "grad_input", "grad_residual", "grad_weight", "grad_bias")
        ]
        + [("training", c_bool), ("relu", c_bool)]
    )


class Axes(Structure):
    _fields_ = [("h", c_int64), ("w", c_int64)]


# The structs of csrc/core/max_pool.h.
class MaxPool2d(Structure):
    _fields_ = [("batch", c_int64)] + [(n, Axes) for n in ("in_", "out", "kernel", "stride", "padding")]


class BnMaxPoolForward(Structure):
    _fields_ = [("norm", BnForward), ("pool", MaxPool2d), ("output", c_void_p), ("index", c_void_p)]


class BnMaxPoolBackward(Structure):
    _fields_ = [("norm", BnBackward), ("pool", MaxPool2d), ("grad", c_void_p), ("index", c_void_p)]


class AddRelu(Structure):
    _fields_ = [("numel", c_int64), ("dtype", c_int)] + [
        (n, c_void_p) for n in ("input", "other", "output")
    ]


class AddReluBackward(Structure):
    _fields_ = [("numel", c_int64), ("dtype", c_int)] + [
        (n, c_void_p) for n in ("grad", "output", "grad_input")
    ]


@cache
def library() -> ctypes.CDLL:
    """Build the emulator, or take the one that FASTRES_EMU_LIBRARY names."""
    path = os.environ.get("FASTRES_EMU_LIBRARY")
    if not path:
        cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        build = ROOT / "build" / "emu"
        build.mkdir(parents=True, exist_ok=True)
        commands = ([cmake, "-S", ROOT / "csrc" / "emu", "-B", build], [cmake, "--build", build, "-j"])
        with (build / "lock").open("w") as lock:  # the tests may run in several processes
            fcntl.flock(lock, fcntl.LOCK_EX)
            for command in commands:
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                if done.returncode:
                    raise RuntimeError(f"building the emulator failed:\n{done.stdout}")
        path = build / "libfastres_emu.so"
    lib = ctypes.CDLL(str(path))
    lib.fastres_emu_batch_norm_workspace_bytes.restype = c_int64
    lib.fastres_emu_batch_norm_workspace_bytes.argtypes = [POINTER(Activation)]
    for name, args in {
        "batch_norm": [POINTER(BnForward), c_void_p],
        "batch_norm_backward": [POINTER(BnBackward), c_void_p],
        "bn_max_pool": [POINTER(BnMaxPoolForward), c_void_p],
        "bn_max_pool_backward": [POINTER(BnMaxPoolBackward), c_void_p],
        "add_relu": [POINTER(AddRelu)],
        "add_relu_backward": [POINTER(AddReluBackward)],
        "use_on_chip": [c_int],
    }.items():
        function = getattr(lib, f"fastres_emu_{name}")
        function.restype, function.argtypes = c_char_p, args
    lib.fastres_emu_overlap_launches(1)  # so that a kernel that does not wait is found
    return lib


def set_schedule(descending: bool) -> None:
    """Choose the order in which the threads of a block run between barriers."""
    library().fastres_emu_set_schedule(int(descending))


def use_on_chip(blocks: int) -> None:
    """Choose how many blocks on a multiprocessor keep tensors between two passes; 0, as at first: none."""
    _call("use_on_chip", blocks)


@contextlib.contextmanager
def on_chip(blocks: int):
    use_on_chip(blocks)
    try:
        yield
    finally:
        use_on_chip(0)


def overlap_launches(overlap: bool) -> None:
    """Choose whether launches may begin before those ahead have ended, as from the first they may here."""
    library().fastres_emu_overlap_launches(int(overlap))


def overlapping_launches() -> int:
    """How many launches there were that could overlap."""
    return library().fastres_emu_overlapping_launches()


def hold_blocks(blocks: int) -> None:
    """Let the card hold so many blocks of a cooperative launch, at most 4; 0: it has no such launch."""
    library().fastres_emu_hold_blocks(blocks)


@contextlib.contextmanager
def another_device(number: int, ptx_version: int):
    """A device for which the kernels were compiled as PTX of so many tenths; 0: not at all."""
    library().fastres_emu_set_device(number, ptx_version)
    try:
        yield
    finally:
        library().fastres_emu_set_device(0, 90)


def leave_error(why: str) -> None:
    """Let what ran before have failed."""
    library().fastres_emu_leave_error(why.encode())


def cooperative_launches() -> int:
    """How many there have been."""
    return library().fastres_emu_cooperative_launches()


def _call(name: str, *args) -> None:
    error = getattr(library(), f"fastres_emu_{name}")(*args)
    if error is not None:
        raise RuntimeError(error.decode())


_shifted: str | None = None


@contextlib.contextmanager
def shifted(output: str):
    """Let the output of that name lie one element further on in memory than others of its call."""
    global _shifted
    _shifted = output
    try:
        yield
    finally:
        _shifted = None


def _poisoned_like(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """An output: a tensor of NaN with the strides, and the misalignment, of `tensor`."""
    size, offset = tensor.numel(), tensor.storage_offset() + (name == _shifted)
    return torch.full((size + offset,), torch.nan, dtype=tensor.dtype).as_strided(
        tensor.shape, tensor.stride(), offset
    )


def _workspace(shape: Activation) -> torch.Tensor:
    size = library().fastres_emu_batch_norm_workspace_bytes(byref(shape))
    return torch.full((size // 8 + 1,), torch.nan, dtype=torch.float64)


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _vector(tensor: torch.Tensor | None) -> ChannelVector:
    return ChannelVector() if tensor is None else ChannelVector(tensor.data_ptr(), DTYPES[tensor.dtype])


def _activation(input: torch.Tensor) -> Activation:
    channels_last = not input.is_contiguous()
    n, c = input.shape[:2]
    return Activation(n, c, input[0, 0].numel() if n * c else 0, channels_last, DTYPES[input.dtype])


def batch_norm(
    input, weight, bias, running_mean, running_var, *, residual=None, relu, training, momentum=0.1, eps=1e-5
):
    """Return output, save_mean, save_rstd; update the running statistics in training."""
    output = _poisoned_like(input, "output")
    mean, rstd = (torch.full((input.shape[1],), torch.nan) for _ in range(2))
    shape = _activation(input)
    workspace = _workspace(shape)
    args = BnForward(
        shape, _pointer(input), _pointer(residual), _pointer(output), _vector(weight), _vector(bias),
        _vector(running_mean), _vector(running_var), _pointer(mean), _pointer(rstd), 0 if training else 1,
        None, relu, momentum, eps,
    )  # fmt: skip
    _call("batch_norm", byref(args), workspace.data_ptr())
    return output, mean, rstd


def batch_norm_again(input, weight, bias, save_mean, save_rstd, *, residual=None, relu):
    """Return the output that a forward pass had which saved these statistics."""
    output = _poisoned_like(input, "output")
    shape = _activation(input)
    workspace = _workspace(shape)
    args = BnForward(
        shape, _pointer(input), _pointer(residual), _pointer(output), _vector(weight), _vector(bias),
        _vector(None), _vector(None), _pointer(save_mean), _pointer(save_rstd), 2, None, relu, 0.0, 0.0,
    )  # fmt: skip
    _call("batch_norm", byref(args), workspace.data_ptr())
    return output


def batch_norm_backward(
    grad, input, output, weight, bias, save_mean, save_rstd, *, grad_residual=False, relu, training
):
    """Return grad_input, grad_residual (or None), grad_weight, grad_bias."""
    grad_input = _poisoned_like(input, "grad_input")
    masked = _poisoned_like(input, "grad_residual") if grad_residual else None
    grad_weight, grad_bias = (torch.full((input.shape[1],), torch.nan) for _ in range(2))
    shape = _activation(input)
    workspace = _workspace(shape)
    args = BnBackward(
        shape, _pointer(grad), _pointer(input), _pointer(output), _vector(weight), _vector(bias),
        _pointer(save_mean), _pointer(save_rstd), _pointer(grad_input), _pointer(masked),
        _pointer(grad_weight), _pointer(grad_bias), training, relu,
    )  # fmt: skip
    _call("batch_norm_backward", byref(args), workspace.data_ptr())
    return grad_input, masked, grad_weight, grad_bias


def _max_pool(pool, input, out) -> MaxPool2d:
    pairs = (input.shape[2:], out, pool.kernel_size, pool.stride, pool.padding)
    return MaxPool2d(input.size(0), *(Axes(*pair) for pair in pairs))


def bn_max_pool(pool, input, weight, bias, running_mean, running_var, *, training, momentum=0.1, eps=1e-5):
    """Return output, index, save_mean, save_rstd; update the running statistics in training.

    Args: pool: a fastres.max_pool.MaxPool. input: channels last.
    """
    out = pool.output_size(input.shape[2:])
    output = torch.empty((*input.shape[:2], *out), dtype=input.dtype, memory_format=torch.channels_last)
    output = _poisoned_like(output, "output")
    index = torch.full((output.numel(),), 255, dtype=torch.uint8)
    mean, rstd = (torch.full((input.shape[1],), torch.nan) for _ in range(2))
    shape = _activation(input)
    shape.channels_last = True
    workspace = _workspace(shape)
    norm = BnForward(
        shape, _pointer(input), None, None, _vector(weight), _vector(bias),
        _vector(running_mean), _vector(running_var), _pointer(mean), _pointer(rstd), 0 if training else 1,
        None, True, momentum, eps,
    )  # fmt: skip
    args = BnMaxPoolForward(norm, _max_pool(pool, input, out), _pointer(output), _pointer(index))
    _call("bn_max_pool", byref(args), workspace.data_ptr())
    return output, index, mean, rstd


def bn_max_pool_backward(pool, grad, input, index, weight, bias, save_mean, save_rstd, *, training):
    """Return grad_input, grad_weight, grad_bias."""
    grad_input = _poisoned_like(input, "grad_input")
    grad_weight, grad_bias = (torch.full((input.shape[1],), torch.nan) for _ in range(2))
    shape = _activation(input)
    shape.channels_last = True
    workspace = _workspace(shape)
    norm = BnBackward(
        shape, None, _pointer(input), None, _vector(weight), _vector(bias), _pointer(save_mean),
        _pointer(save_rstd), _pointer(grad_input), None, _pointer(grad_weight), _pointer(grad_bias),
        training, True,
    )  # fmt: skip
    args = BnMaxPoolBackward(norm, _max_pool(pool, input, grad.shape[2:]), _pointer(grad), _pointer(index))
    _call("bn_max_pool_backward", byref(args), workspace.data_ptr())
    return grad_input, grad_weight, grad_bias


def add_relu(input, other):
    """Return relu(input + other)."""
    output = _poisoned_like(input, "output")
    args = AddRelu(input.numel(), DTYPES[input.dtype], _pointer(input), _pointer(other), _pointer(output))
    _call("add_relu", byref(args))
    return output


def add_relu_backward(grad, output):
    """Return grad * [output > 0]."""
    grad_input = _poisoned_like(grad, "grad_input")
    args = AddReluBackward(
        grad.numel(), DTYPES[grad.dtype], _pointer(grad), _pointer(output), _pointer(grad_input)
    )
    _call("add_relu_backward", byref(args))
    return grad_input

"""Where the time of a step goes: convolutions, linear layers, the optimizer, the rest."""

import contextlib
import os
import re
from collections.abc import Callable

import torch

PARTS = ("convolution", "linear", "optimizer", "the rest")
_PROFILED = 3  # calls: the sums of one vary by several percent

# Ours with what is fused into them.
_CONVOLUTION = re.compile(r"(aten|mkldnn|onednn)::\w*(convolution|conv[123]d)|fastres::conv_")
_LINEAR = re.compile(r"(aten|mkldnn|onednn)::\w*(linear|addmm|mm|matmul)")


def time_by_part(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds a call spent in convolutions, in linear layers, in the optimizer and in the rest.

    Self time by op, under the profiler: the CPU's, or where `device` is a CUDA device that of the kernels.
    """
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "6"
    )  # else the profiler tells on stderr that it starts and stops
    from torch.profiler import ProfilerActivity, profile, record_function

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(_PROFILED):
            # Its self time is what passes between the ops, in Python.
            with contextlib.nullcontext() if cuda else record_function("step"):
                step()
        if cuda:
            torch.cuda.synchronize()
    parts = dict.fromkeys(PARTS, 0.0)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CPU:
            self_time = event.self_device_time_total if cuda else event.self_cpu_time_total
            parts[_part(event)] += self_time / 1e6 / _PROFILED
    return parts


def _part(event) -> str:
    if _CONVOLUTION.match(event.name):
        return "convolution"
    if _LINEAR.match(event.name):
        return "linear"
    while event is not None:
        if event.name.startswith("Optimizer."):
            return "optimizer"
        event = event.cpu_parent
    return "the rest"

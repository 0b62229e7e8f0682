"""ResNets for PyTorch with convolution, batch norm, ReLU and the residual addition fused."""

from importlib import import_module

import torch  # noqa: F401  _C finds its libraries loaded

try:
    _C = import_module("fastres._C")
except ImportError as _error:  # `fastres doctor` runs all the same, to say what is wrong
    _reason = str(_error)

    def __getattr__(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"fastres: {_reason}; `fastres doctor` tells what to do")
else:
    from fastres import models, nn, ops
    from fastres.explain import explain
    from fastres.fuse import fuse, unfuse
    from fastres.inference import optimize_for_inference
    from fastres.memory import empty_cache

    __version__ = _C.build_info()["version"]
    __all__ = [  # noqa: F822
        "empty_cache",
        "explain",
        "fuse",
        "models",
        "nn",
        "ops",
        "optimize_for_inference",
        "profile",
        "unfuse",
    ]

    def __getattr__(name: str):
        if name == "profile":  # imported where it is used
            from fastres.profiler import profile

            return profile
        raise AttributeError(f"module 'fastres' has no attribute {name!r}")

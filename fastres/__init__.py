"""ResNets for PyTorch with convolution, batch norm, ReLU and the residual addition fused."""

from fastres import models, nn, ops
from fastres._C import build_info
from fastres.explain import explain
from fastres.fuse import fuse, unfuse

__version__ = build_info()["version"]
__all__ = ["explain", "fuse", "models", "nn", "ops", "unfuse"]

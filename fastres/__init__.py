"""ResNets for PyTorch with convolution, batch norm, ReLU and the residual addition fused."""

from fastres import ops
from fastres._C import build_info

__version__ = build_info()["version"]
__all__ = ["ops"]

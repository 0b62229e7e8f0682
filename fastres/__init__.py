"""Fused ResNets for PyTorch: conv, batch norm, ReLU and the residual addition in as few passes as they take."""

from fastres import ops
from fastres._C import build_info

__version__ = build_info()["version"]
__all__ = ["ops"]

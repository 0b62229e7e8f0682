"""Profiling a model block by block, fused beside unfused, against what the machine can do."""

from fastres.profiler.measure import ProfileError, profile
from fastres.profiler.result import Profile

__all__ = ["Profile", "ProfileError", "profile"]

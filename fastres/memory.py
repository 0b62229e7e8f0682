"""Large results of the CPU kernels live in memory that is kept from one step to the next.

csrc/cpu/memory_pool.h tells why. With FASTRES_KEEP_MEMORY=off in the environment they come from malloc, as
those of stock PyTorch do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from fastres import _C


def empty_cache() -> None:
    """Give the memory that fastres keeps on the CPU, and no tensor uses, back to the system.

    It is of use where a program goes on with something else after training. torch.cuda.empty_cache is the
    same for a GPU.
    """
    _C.release_memory()


@contextmanager
def from_malloc() -> Iterator[None]:
    """Inside, results come from malloc, where PyTorch's own tools see them."""
    before = _C.keep_memory(False)
    try:
        yield
    finally:
        _C.keep_memory(before)

"""What a forward keeps for its backward."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.autograd.graph import saved_tensors_hooks


@contextlib.contextmanager
def kept(*, apart_from: Iterable[torch.Tensor] = ()) -> Iterator[Callable[[], int]]:
    """Counts the bytes of all saved tensors, each storage once."""
    others = {tensor.untyped_storage().data_ptr() for tensor in apart_from}
    storages, tensors = {}, []

    def pack(tensor):
        tensor = tensor.detach()  # a node that holds its own output would never be freed
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        tensors.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(size for storage, size in storages.items() if storage not in others)

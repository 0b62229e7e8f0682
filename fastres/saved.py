"""What a forward pass keeps for the backward pass."""

from collections import Counter

import torch
from torch import Tensor


class Saved:
    """Bytes kept for the backward pass, part by part: each storage once.

    Args:
        own: tensors that are there anyway: parameters, buffers, the input.
    """

    def __init__(self, own: list[Tensor]) -> None:
        self.bytes: Counter[int | str] = Counter()
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._part: int | str = ""

    def switch(self, part: int | str, direction: str) -> None:
        self._part = part

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # All that is saved lives until the backward, so that no address is met twice.
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes[self._part] += storage.nbytes()
        return tensor

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

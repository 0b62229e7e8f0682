"""FLOPs and bytes of one step, op by op, counted from the shapes of what stock PyTorch runs.

A part must move, in one direction, each tensor that comes into it, each that leaves it and each that it
keeps for the backward pass, once. What it makes and uses up within itself need never reach memory; what
stock PyTorch moves beyond that, and how often, is what fusion can save.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastres.profiler.walk import Part

Place = tuple[Part, str]  # part and direction
_OVERWRITING = ("aten::copy_", "aten::fill_", "aten::zero_")  # which do not read what they write to


@dataclass
class _Memory:
    """One storage: who wrote it, who read what someone else had written, and whether anyone read it."""

    bytes: int
    read: bool = False
    writers: set[Place] = field(default_factory=set)
    readers: set[Place] = field(default_factory=set)


class Count(TorchDispatchMode):
    """Counts the ops that run in this context; `switch` says for which part and direction.

    Attributes:
        flops: of matrix products and convolutions, two for a multiplication with its addition.
        traffic: bytes that the ops read and write, each op's tensors once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[Place] = Counter()
        self.traffic: Counter[Place] = Counter()
        self._at: Place = ("", "forward")
        self._memory: dict[int, _Memory] = {}  # by address of the storage that is there now
        self._all: list[_Memory] = []

    def switch(self, part: Part, direction: str) -> None:
        self._at = (part, direction)

    def bytes(self) -> dict[Place, int]:
        """That each part and direction must move."""
        moved: dict[Place, int] = defaultdict(int)
        for memory in self._all:
            for place in memory.readers:
                moved[place] += memory.bytes
            for place in memory.writers:
                # What nobody reads inside the step is its result, such as a gradient or a running mean.
                if memory.readers - {place} or not memory.read:
                    moved[place] += memory.bytes
        return moved

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry:
            # In inference mode ops such as aten::conv2d come as they are called, made of others.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._note(func, inputs, outputs)
        flops = flop_registry.get(func._overloadpacket)
        if flops is not None:
            self.flops[self._at] += flops(*args, **kwargs, out_val=result)
        return result

    def _note(self, func, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        addresses = {tensor.untyped_storage()._cdata for tensor in inputs}
        new = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in addresses]
        for tensor in new:
            memory = _Memory(_size(tensor))
            self._memory[tensor.untyped_storage()._cdata] = memory
            self._all.append(memory)
        writes = [
            argument.alias_info is not None and argument.alias_info.is_write
            for argument in func._schema.arguments
        ]
        if not new and not any(writes):
            return  # a view
        name = func._overloadpacket._qualified_op_name
        if name.startswith(("aten::empty", "aten::new_empty")):
            return  # nothing is written yet
        written = [*new, *(outputs if any(writes) else ())]
        for tensor in inputs[1:] if name in _OVERWRITING else inputs:
            memory = self._of(tensor)
            memory.read = True
            if self._at not in memory.writers:
                memory.readers.add(self._at)
            self.traffic[self._at] += _size(tensor)
        for tensor in written:
            self._of(tensor).writers.add(self._at)
            self.traffic[self._at] += _size(tensor)

    def _of(self, tensor: Tensor) -> _Memory:
        address = tensor.untyped_storage()._cdata
        if address not in self._memory:
            self._memory[address] = _Memory(_size(tensor))
            self._all.append(self._memory[address])
        return self._memory[address]


def _size(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())

"""Telling whether anything about a model has changed that its forward may depend on."""

from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastres import _C
from fastres.fused_steps import fused_steps
from fastres.vet import from_torch
from fastres.watch import stock_class

# Dicts that change without becoming other dicts.
_DICTS = (
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_address = methodcaller("data_ptr")
_version = attrgetter("_version")
_values = methodcaller("values")
_forward = attrgetter("forward")  # of the classes of torch.nn, whose other attributes nobody changes


def can_be_taken_of(model: nn.Module) -> bool:
    """Not where something is not what a Snapshot looks at: TorchScript, parameters that are lazy as yet."""
    scripted = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    return not scripted and not any(map(is_lazy, chain(model.parameters(), model.buffers())))


class Snapshot:
    """The attributes of a model's modules as they are now: which objects, not what is in them.

    Of classes what they define, too; of parameters and buffers also where their memory is; of `counted`
    ones also how often they changed.

    Args:
        model: of which one can be taken.
        counted: some of its tensors, none of them made in torch.inference_mode().
    """

    def __init__(self, model: nn.Module, counted: Iterable[Tensor] = ()) -> None:
        self._modules = list(model.modules())
        self._classes = list(map(type, self._modules))
        classes = {*self._classes, *map(stock_class, self._modules)}
        self._torch_classes = [cls for cls in classes if from_torch(cls.__module__)]
        self._forwards = list(map(_forward, self._torch_classes))
        bases = {base for cls in classes for base in cls.__mro__ if base is not object}
        self._namespaces = [vars(base) for base in bases if not from_torch(base.__module__)]
        self._class_values = self._values_of_classes()
        attributes = [vars(module) for module in self._modules]
        self._dicts = [*attributes, *(by_name[name] for name in _DICTS for by_name in attributes)]
        self._values = tuple(value for by_name in self._dicts for value in by_name.values())
        self._tensors = [*model.parameters(), *model.buffers()]
        self._addresses = list(map(_address, self._tensors))
        self._counted = list(counted)
        self._versions = list(map(_version, self._counted))
        self._fused_steps = fused_steps()

    def holds(self) -> bool:
        """Whether all of that is as it was."""
        # Without a loop in Python: this is asked at every call of the model.
        return (
            self.structure_holds()
            and list(map(_version, self._counted)) == self._versions
            and self._fused_steps == fused_steps()
            and list(map(_address, self._tensors)) == self._addresses
        )

    def structure_holds(self) -> bool:
        """Whether the modules, their classes and attributes are."""
        return (
            _C.hold(self._dicts, self._values)
            and list(map(type, self._modules)) == self._classes
            and list(map(_forward, self._torch_classes)) == self._forwards
            and self._same_classes()
        )

    def _values_of_classes(self) -> list[Any]:
        return list(chain.from_iterable(map(_values, self._namespaces)))

    def _same_classes(self) -> bool:
        values = self._values_of_classes()
        return len(values) == len(self._class_values) and all(map(is_, values, self._class_values))

    def requires_grad(self) -> bool:
        """Whether a parameter asks for a gradient."""
        return any(tensor.requires_grad for tensor in self._tensors)

"""Residual networks that run fused, with torchvision's names, get_model(name) and list_models()."""

from typing import Any

from torch import nn

from fastres.models import cifar, resnet
from fastres.models.cifar import *  # noqa: F403
from fastres.models.resnet import *  # noqa: F403

_BUILDERS = {
    name: getattr(module, name)
    for module in (resnet, cifar)
    for name in module.__all__
    if name[0].islower()
}
__all__ = [*resnet.__all__, *cifar.__all__, "get_model", "list_models"]


def list_models() -> list[str]:
    """The names that get_model takes."""
    return list(_BUILDERS)


def get_model(name: str, **kwargs: Any) -> nn.Module:
    """The model of that name.

    Args:
        name: one of list_models().
        **kwargs: passed on to the model's function.

    Raises:
        ValueError: no such model.
    """
    if name not in _BUILDERS:
        raise ValueError(f"Unknown model {name}")
    return _BUILDERS[name](**kwargs)

"""Models by the names that commands take: fastres's own, other libraries', and a user's functions."""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

from torch import nn

from fastres import models
from fastres.errors import did_you_mean, with_type

# As in the configurations of microsoft/resnet-*.
_TRANSFORMERS_DEPTHS = {
    "resnet-18": ("basic", [2, 2, 2, 2]),
    "resnet-26": ("bottleneck", [2, 2, 2, 2]),
    "resnet-34": ("basic", [3, 4, 6, 3]),
    "resnet-50": ("bottleneck", [3, 4, 6, 3]),
    "resnet-101": ("bottleneck", [3, 4, 23, 3]),
    "resnet-152": ("bottleneck", [3, 8, 36, 3]),
}
_TRANSFORMERS_SIZES = {"basic": [64, 128, 256, 512], "bottleneck": [256, 512, 1024, 2048]}

HELP = (  # of the commands' option --model
    "one of fastres.models; or torchvision:NAME, timm:NAME, transformers:resnet-18, 26, 34, 50, 101 or "
    "152, package.module:function or path.py:function, whose model is fused first (default: %(default)s)"
)


def build(name: str) -> nn.Module:
    """The model of that name, with random weights; nothing is downloaded.

    Args:
        name: one of fastres.models.list_models(); torchvision:NAME (a classifier), timm:NAME or
            transformers:resnet-18, 26, 34, 50, 101 or 152; or package.module:function or path.py:function,
            a function that returns the model.

    Returns:
        The model; one that is not of fastres.models is as its library makes it, not fused.

    Raises:
        ValueError: it cannot be built; the message says why.
    """
    library, colon, rest = name.partition(":")
    if not colon:
        return _own(name)
    if library in _LIBRARIES:
        make = _LIBRARIES[library](rest)
    else:
        place, _, function = name.rpartition(":")
        make = _function(place, function)
    try:
        model = make()
    except (Exception, SystemExit) as error:
        raise ValueError(f"building it raised {with_type(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"it returns {type(model).__name__}, expected torch.nn.Module")
    return model


def source(name: str) -> str:
    """What changes with the code of a model's path.py:function; "" of other names."""
    file = Path(name.rpartition(":")[0])
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.suffix == ".py" and file.is_file() else ""


def _own(name: str) -> nn.Module:
    if name.endswith(".py"):
        raise ValueError(f"expected a function of that file as well, {name}:function")
    names = models.list_models()
    if name not in names:
        hint = did_you_mean(name, names, otherwise=f"there are {', '.join(names)}")
        raise ValueError(f"there is no such model; {hint}")
    return models.get_model(name)


# ---------------------------------------------------------------------------------------------------------
# of other libraries


def _torchvision(name: str) -> Callable[[], nn.Module]:
    models = _imported("torchvision.models")
    names = models.list_models(module=models)  # a detector's function would download its backbone
    if name not in names:
        hint = did_you_mean(name, names, otherwise="torchvision.models.list_models() lists them")
        raise ValueError(f"torchvision has no such classifier; {hint}")
    return lambda: models.get_model(name, weights=None)


def _timm(name: str) -> Callable[[], nn.Module]:
    timm = _imported("timm")
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models(), otherwise="timm.list_models() lists them")
        raise ValueError(f"timm has no such model; {hint}")
    return lambda: timm.create_model(name, pretrained=False)


def _transformers(name: str) -> Callable[[], nn.Module]:
    if name not in _TRANSFORMERS_DEPTHS:
        names = ", ".join(_TRANSFORMERS_DEPTHS)
        hint = did_you_mean(name, _TRANSFORMERS_DEPTHS, otherwise=f"there are {names}")
        raise ValueError(f"no such model of transformers is known; {hint}")
    resnet = _imported("transformers.models.resnet.modeling_resnet")
    layer_type, depths = _TRANSFORMERS_DEPTHS[name]

    def make() -> nn.Module:
        config = resnet.ResNetConfig(
            depths=depths,
            hidden_sizes=_TRANSFORMERS_SIZES[layer_type],
            layer_type=layer_type,
            num_labels=1000,
        )
        return resnet.ResNetForImageClassification(config)

    return make


_LIBRARIES = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}


# ---------------------------------------------------------------------------------------------------------
# a user's function


def _function(place: str, name: str) -> Callable[[], object]:
    module = _from_file(Path(place)) if place.endswith(".py") else _imported(place)
    if not hasattr(module, name):
        names = [known for known, value in vars(module).items() if callable(value) and known[0] != "_"]
        hint = did_you_mean(name, names, otherwise=f"there are {', '.join(names) or 'none at all'}")
        raise ValueError(f"{place} has no function {name!r}; {hint}")
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(f"{place}:{name} has type {type(function).__name__}, expected a function")
    return function


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    # Under a name that hides no other module, and listed, since dataclasses look their module up.
    spec = importlib.util.spec_from_file_location(f"_fastres_model_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that is not meant to be imported may exit
        del sys.modules[spec.name]
        raise ValueError(f"{path} cannot be imported: {with_type(error)}") from error
    return module


def _imported(name: str) -> ModuleType:
    try:
        return import_module(name)
    except (Exception, SystemExit) as error:
        package = name.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise ValueError(f"{package} is not installed") from error
        raise ValueError(f"{name} cannot be imported: {with_type(error)}") from error

"""`fastres explain`: the table of fastres.explain for a model by name."""

import argparse
import importlib.util
import sys
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from fastres import models
from fastres.explain import explain
from fastres.fuse import fuse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        default="resnet50",
        help="one of fastres.models; or package.module:function or path.py:function, whose model is fused "
        "first (default: %(default)s)",
    )
    add("--batch", type=int, default=2, help="(default: %(default)s)")
    add("--image-size", type=int, default=64, help="(default: %(default)s)")
    add("--channels", type=int, default=3, help="of the images (default: %(default)s)")
    add("--mode", choices=["train", "infer"], default="train", help="(default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    try:
        model = _build(arguments.model)
    except (ValueError, ImportError, AttributeError, OSError) as error:
        print(f"fastres explain: --model {arguments.model}: {error}", file=sys.stderr)
        return 2
    model.train(arguments.mode == "train")
    size = arguments.image_size
    with torch.set_grad_enabled(arguments.mode == "train"):
        print(explain(model, torch.randn(arguments.batch, arguments.channels, size, size)))
    return 0


def _build(name: str) -> nn.Module:
    place, _, function = name.rpartition(":")
    if not place:
        return models.get_model(name)
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = import_module(place)
    return fuse(getattr(module, function)(), inplace=True)

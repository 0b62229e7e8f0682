"""`fastres explain`: the table of fastres.explain for a model by name."""

import argparse
import sys

import torch

from fastres import options
from fastres.errors import first_line
from fastres.explain import Explanation, explain
from fastres.fuse import fuse
from fastres.models import by_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="resnet50", help=by_name.HELP)
    add("--batch", type=int, default=4, help="images that the model is run on (default: %(default)s)")
    add("--image-size", type=int, default=96, help="side of the images, pixels (default: %(default)s)")
    add("--channels", type=int, default=3, help="of the images (default: %(default)s)")
    add("--mode", choices=["train", "infer"], default="train", help="(default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    try:
        print(_explanation(arguments))
    except ValueError as error:
        print(f"fastres explain: {error}", file=sys.stderr)
        return 2
    return 0


def _explanation(arguments: argparse.Namespace) -> Explanation:
    options.check(arguments)
    try:
        model = by_name.build(arguments.model)
    except ValueError as error:
        raise ValueError(f"--model {arguments.model}: {error}") from error
    if ":" in arguments.model:
        model = fuse(model, inplace=True)
    training, size = arguments.mode == "train", arguments.image_size
    with torch.set_grad_enabled(training):
        try:
            images = torch.randn(arguments.batch, arguments.channels, size, size)
            channels_last = {"memory_format": torch.channels_last}  # as it should be used
            return explain(model.train(training).to(**channels_last), images.to(**channels_last))
        except (Exception, SystemExit) as error:  # whatever the model's code raises
            message = f"{arguments.model} cannot run these settings: {first_line(error)}"
            raise ValueError(message) from error

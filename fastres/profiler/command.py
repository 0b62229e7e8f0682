"""`fastres profile`: the table of fastres.profile for a model by name."""

import argparse
import sys
from pathlib import Path

import torch

from fastres import options
from fastres.errors import told_as
from fastres.models import by_name
from fastres.profiler.measure import ProfileError, profile, steps
from fastres.profiler.result import Profile
from fastres.profiler.table import show_comparison
from fastres.progress import shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="resnet50", help=by_name.HELP)
    add("--batch", type=int, default=16, help="images a step (default: %(default)s)")
    add("--image-size", type=int, default=224, help="side of the images, pixels (default: %(default)s)")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast (default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    add("--mode", choices=["train", "infer"], default="train", help="(default: %(default)s)")
    add("--against", default="stock", help="stock or stock,compile (default: %(default)s)")
    add("--repeat", type=int, default=5, help="rounds (default: %(default)s)")
    add("--threads", type=int, help="threads of PyTorch's CPU ops (default here: PyTorch's own choice)")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--html", type=Path, metavar="FILE", help="write a report to look at, which needs no network")
    add("--trace", type=Path, metavar="FILE", help="write a trace for Perfetto or chrome://tracing")
    add(
        "--from",
        type=Path,
        metavar="FILE",
        dest="source",
        help="measure nothing, but show what --json wrote to this file",
    )
    add(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="measure nothing, but tell what changed from one file of --json to the other",
    )
    add(
        "--fail-above",
        type=float,
        metavar="PERCENT",
        help="with --compare: exit status 1 where the step or a block became slower by more than this",
    )


def run(arguments: argparse.Namespace) -> int:
    threads = torch.get_num_threads()
    try:
        _check_files(arguments)
        if arguments.compare is not None:
            return _compare(*arguments.compare, arguments.fail_above)
        result = _measure(arguments) if arguments.source is None else Profile.read(arguments.source)
        try:
            if arguments.json is not None:
                result.to_json(arguments.json)
            if arguments.html is not None:
                result.to_html(arguments.html)
        finally:
            result.show()
    except BrokenPipeError:  # nobody reads what is shown
        raise
    except (ValueError, OSError) as error:
        print(f"fastres profile: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    return 0


def _compare(a: Path, b: Path, fail_above: float | None) -> int:
    comparison = Profile.read(a).compare(Profile.read(b))
    show_comparison(comparison)
    slower = [] if fail_above is None else comparison.slower_than(fail_above)
    if slower:
        print(f"Slower by more than {fail_above:g} %: {', '.join(map(str, slower))}.")
    return 1 if slower else 0


def _check_files(arguments: argparse.Namespace) -> None:
    files = {option: getattr(arguments, option) for option in ("json", "html", "trace")}
    given = [path.resolve() for path in (*files.values(), arguments.source) if path is not None]
    if len({*given}) < len(given):
        raise ProfileError("--json, --html, --trace and --from: two of them are one file")
    for option, path in files.items():
        options.check_writable(option, path)
    if arguments.source is not None and arguments.trace is not None:
        raise ProfileError("--trace: a trace is made while measuring, which --from does not")
    if arguments.fail_above is not None and arguments.compare is None:
        raise ProfileError("--fail-above: goes with --compare")
    if arguments.fail_above is not None and not arguments.fail_above >= 0:
        raise ProfileError(f"--fail-above {arguments.fail_above:g}: expected 0 or more")
    if arguments.compare is not None and any(
        (arguments.json, arguments.html, arguments.trace, arguments.source)
    ):
        raise ProfileError("--compare: only prints; leave out --json, --html, --trace and --from")


def _measure(arguments: argparse.Namespace) -> Profile:
    options.check(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    try:
        model = by_name.build(arguments.model)
    except ValueError as error:
        raise ProfileError(f"--model {arguments.model}: {error}") from error
    size, layout = arguments.image_size, {"memory_format": torch.channels_last}
    with told_as(ProfileError, f"--batch {arguments.batch}"):  # of too little memory, or no such number
        images = torch.randn(arguments.batch, 3, size, size).to(arguments.device, **layout)
    with told_as(ProfileError, f"--model {arguments.model}"):
        model = model.to(arguments.device, **layout)
    against = tuple(filter(None, arguments.against.split(",")))
    rounds = steps(against, arguments.repeat)
    with shown("profile", rounds) as advance:
        return profile(
            model,
            images,
            mode=arguments.mode,
            dtype=arguments.dtype,
            against=against,
            repeat=arguments.repeat,
            name=arguments.model,
            trace_path=arguments.trace,
            advance=advance,
        )

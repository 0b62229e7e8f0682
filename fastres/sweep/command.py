"""`fastres sweep`: `fastres bench` over a grid, kept in a file as it goes on."""

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from fastres import bench, memory, options
from fastres.errors import SettingsError, first_line
from fastres.models import by_name
from fastres.progress import shown
from fastres.sweep.grid import Cell, Sweep, SweepError, cells
from fastres.sweep.show import show
from fastres.timing import Machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="resnet18,resnet50", help="as of `fastres bench` (default: %(default)s)")
    add("--batch", default="1,4,16", help="images a step (default: %(default)s)")
    add("--image-size", default="160,224", help="side of the images, pixels (default: %(default)s)")
    add("--dtype", default="fp32,bf16", help="fp32, bf16 or both (default: %(default)s)")
    add("--threads", help="threads of PyTorch's CPU ops (default here: PyTorch's own choice)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    add("--mode", choices=["train", "infer"], default="train", help="(default: %(default)s)")
    add("--against", default="eager", help="eager, compile or eager,compile (default: %(default)s)")
    add("--repeat", type=int, default=5, help="rounds in each cell (default: %(default)s)")
    add(
        "--out",
        type=Path,
        default=Path("sweep.json"),
        metavar="FILE",
        help="where every cell is kept once it is measured; the same command goes on with those that are "
        "missing (default: %(default)s)",
    )
    add("--restart", action="store_true", help="measure all anew, whatever the file has")
    add("--html", type=Path, metavar="FILE", help="write heat maps to look at, which need no network")


def run(arguments: argparse.Namespace) -> int:
    threads = torch.get_num_threads()
    sweep, grid = None, []
    try:
        grid = _grid(arguments)
        sweep = _begun(arguments, grid)
        _measure(sweep, grid, arguments)
        try:
            if arguments.html is not None:
                from fastres.sweep.heat_map import write

                write(sweep, grid, arguments.html)
        finally:
            show(sweep, grid)
    except BrokenPipeError:  # nobody reads what is shown
        raise
    except (SettingsError, OSError) as error:
        print(f"fastres sweep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        done = sum(cell in sweep.results for cell in grid) if sweep else 0
        kept = f"{done} of {len(grid)} cells are in {arguments.out}; the same command goes on"
        print(f"\nfastres sweep: interrupted; {kept if done else 'no cell was finished'}", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)
    return 2 if len(sweep.errors(grid)) == len(grid) else 0


def _grid(arguments: argparse.Namespace) -> list[Cell]:
    threads = str(torch.get_num_threads()) if arguments.threads is None else arguments.threads
    grid = cells(
        _list("--model", arguments.model),
        _list("--dtype", arguments.dtype),
        _numbers("--threads", threads),
        _numbers("--batch", arguments.batch),
        _numbers("--image-size", arguments.image_size),
    )
    for cell in grid:
        if cell.dtype not in ("fp32", "bf16"):
            raise SweepError(f"--dtype {cell.dtype}: expected fp32, bf16 or fp32,bf16")
        bench.check(_settings(cell, arguments))
    for model in dict.fromkeys(cell.model for cell in grid):
        try:
            with torch.random.fork_rng():
                by_name.build(model)
        except ValueError as error:
            raise SweepError(f"--model {model}: {error}") from error
    options.check_writable("out", arguments.out)
    options.check_writable("html", arguments.html)
    if arguments.html is not None and arguments.html.resolve() == arguments.out.resolve():
        raise SweepError("--out and --html: both are one file")
    return grid


def _list(option: str, text: str) -> list[str]:
    values = [value.strip() for value in text.split(",")]
    if not all(values):
        raise SweepError(f"{option} {text!r}: expected values with commas between them")
    return values


def _numbers(option: str, text: str) -> list[int]:
    values = _list(option, text)
    for value in values:
        if not value.isdecimal() or int(value) < 1:
            raise SweepError(f"{option} {value}: expected whole numbers of 1 or more")
    return [int(value) for value in values]


def _settings(cell: Cell, arguments: argparse.Namespace) -> argparse.Namespace:
    """`fastres bench`'s arguments for a cell."""
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return argparse.Namespace(
        **{
            **vars(parser.parse_args([])),
            **vars(cell),
            "device": arguments.device,
            "mode": arguments.mode,
            "against": arguments.against,
            "repeat": arguments.repeat,
        }
    )


def _begun(arguments: argparse.Namespace, grid: list[Cell]) -> Sweep:
    settings = {name: getattr(arguments, name) for name in ("device", "mode", "against", "repeat")}
    machine = Machine.at_hand(torch.device(arguments.device)).as_dict()
    for changing in ("threads", "gpu_clocks"):
        del machine[changing]
    sweep = Sweep(settings, machine)
    if arguments.out.exists() and not arguments.restart:
        sweep.read(arguments.out)
    return sweep


def _measure(sweep: Sweep, grid: list[Cell], arguments: argparse.Namespace) -> None:
    source = {cell.model: by_name.source(cell.model) for cell in grid}
    missing = [
        cell
        for cell in grid
        if cell not in sweep.results or sweep.results[cell].get("source", "") != source[cell.model]
    ]
    settings = {cell: _settings(cell, arguments) for cell in missing}
    steps = {cell: bench.steps(s, bench.check(s)) for cell, s in settings.items()}
    with shown("sweep", sum(steps.values())) as advance:
        for cell in missing:
            advance(steps=0, title=str(cell))
            done = 0

            def step() -> None:
                nonlocal done
                done += 1
                advance()

            sweep.results[cell] = {"source": source[cell.model], **_result(settings[cell], step)}
            advance(steps=steps[cell] - done)
            sweep.write(arguments.out)


def _result(settings: argparse.Namespace, advance: Callable[[], object]) -> dict:
    try:
        result = bench.measure(settings, bench.check(settings), advance)
    # What a model raises that is too large for the memory, or has images that are too small for it.
    except (SettingsError, RuntimeError, MemoryError) as error:
        return {"error": first_line(error)}
    finally:
        if settings.against != "eager":
            torch.compiler.reset()  # else one process compiles a model's forward for a few cells only
        gc.collect()
        memory.empty_cache()
        if settings.device == "cuda":
            torch.cuda.empty_cache()
    variants, speedups = result["variants"], result["speedup"]
    return {
        "images_per_second": {name: variant["images_per_second"] for name, variant in variants.items()},
        "seconds_by_round": {name: variant["seconds_by_round"] for name, variant in variants.items()},
        "speedup": {
            name: {key: speedup[key] for key in ("median", "low", "high")}
            for name, speedup in speedups.items()
        },
    }

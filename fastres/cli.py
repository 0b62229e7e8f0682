"""The `fastres` command. Each subcommand is imported only when it is asked for."""

import argparse
import os
import sys
from importlib import import_module

# name: module with add_arguments(parser) and run(arguments) -> exit status, what it does
_COMMANDS = {
    "train": ("fastres.train.command", "train a residual network to a held-out accuracy"),
    "bench": ("fastres.bench", "time fused against stock layers, interleaved"),
    "sweep": ("fastres.sweep.command", "bench over a grid of batches, image sizes, dtypes and threads"),
    "profile": ("fastres.profiler.command", "time a model block by block, fused beside stock layers"),
    "explain": ("fastres.explain_command", "list what runs fused in a model, what does not, and why"),
    "doctor": ("fastres.doctor", "check this installation, each op against float64"),
}


def main(argv: list[str] | None = None) -> int:
    if sys.stdout is None:  # as of `fastres doctor >&-`
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # a sign that the terminal lacks is no reason to end
        sys.stdout.reconfigure(errors="replace")
    argv = sys.argv[1:] if argv is None else argv
    chosen = next((word for word in argv if not word.startswith("-")), None)
    try:
        try:
            return _main(argv, chosen)
        except KeyboardInterrupt:  # also while PyTorch is imported
            print(f"\n{' '.join(filter(None, ('fastres', chosen)))}: interrupted", file=sys.stderr)
            return 130
        finally:
            sys.stdout.flush()  # here and not at exit, where a closed pipe could no longer be dealt with
    except BrokenPipeError:  # such as `fastres doctor | head -1`
        pass
    except OSError as error:  # of the output's, as the commands deal with those of their files
        print(f"fastres: cannot write its output: {error.strerror or error}", file=sys.stderr)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    return 1


def _main(argv: list[str], chosen: str | None) -> int:
    parser = argparse.ArgumentParser(prog="fastres", description="ResNets with fused layers for PyTorch.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, (module, help_text) in _COMMANDS.items():
        subparser = commands.add_parser(name, help=help_text, description=help_text)
        if name == chosen:
            if name != "doctor" and (problem := _no_such_isa()):  # which doctor tells more about
                print(f"fastres {name}: {problem}", file=sys.stderr)
                return 2
            try:
                command = import_module(module)
            except ImportError as error:
                print(f"fastres {name}: {error}", file=sys.stderr)
                return 2
            command.add_arguments(subparser)
    arguments = parser.parse_args(argv)
    if arguments.version:
        import fastres

        print(getattr(fastres, "__version__", "unknown: `fastres doctor` tells why"))
        return 0
    if arguments.command is None:
        parser.print_help()
        return 2
    return command.run(arguments)


def _no_such_isa() -> str:
    """What is wrong with FASTRES_CPU_ISA, "" for nothing."""
    try:
        import_module("fastres._C").cpu_isa()
    except ValueError as error:
        return str(error)
    except ImportError:  # the command will say so
        pass
    return ""


if __name__ == "__main__":
    sys.exit(main())

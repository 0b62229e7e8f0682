"""The command line: help without heavy imports, versions, unknown words."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastres
from fastres import cli


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == fastres.__version__


def test_nothing_asked_prints_help(capsys):
    assert cli.main([]) == 2
    assert {"train", "bench", "sweep", "profile", "explain", "doctor"} <= set(
        capsys.readouterr().out.split()
    )


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["fly"])
    assert exit.value.code == 2
    assert "invalid choice: 'fly'" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    assert exit.value.code == 0 and "usage: fastres " + command in capsys.readouterr().out


def test_module_runs_as_a_command():
    run = subprocess.run([sys.executable, "-m", "fastres", "--version"], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, fastres.__version__)


def test_explain_prints_each_block(capsys):
    assert cli.main("explain --model cifar_resnet20 --image-size 16".split()) == 0
    assert "layer3.2" in capsys.readouterr().out


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "arguments",
    [
        "--version",
        "explain --model cifar_resnet20 --image-size 16",
        f"profile --from {Path(__file__).with_name('profile.json')}",
    ],
)
def test_a_reader_that_went_away(arguments, unbuffered):
    command = [sys.executable, "-m", "fastres", *arguments.split()]
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    run = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.close()
    assert run.stderr.read() == ""
    assert run.wait() == 1


@pytest.mark.parametrize("measuring", ["profile", "sweep"])
def test_files_are_written_though_the_reader_went_away(measuring, tmp_path):
    page, out = tmp_path / "page.html", tmp_path / "sweep.json"
    arguments = {
        "profile": f"--from {Path(__file__).with_name('profile.json')} --html {page}",
        "sweep": "--model cifar_resnet20 --batch 2 --image-size 8 --repeat 1 --threads 1 --dtype fp32 "
        f"--out {out} --html {page}",
    }[measuring]
    command = [sys.executable, "-m", "fastres", measuring, *arguments.split()]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.close()
    assert "BrokenPipe" not in run.stderr.read() and run.wait() == 1
    assert page.read_text().startswith("<!doctype html>")


def test_import_loads_nothing_heavy():
    code = (
        "import sys, torch; before = set(sys.modules); import fastres;"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}"
        "& {'sklearn', 'matplotlib', 'rich', 'PIL', 'pandas', 'torchvision', 'timm', 'transformers'}),"
        "[name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[] []", run.stderr


@pytest.mark.parametrize("command", ["--version", "train", "bench", "sweep", "profile", "explain"])
def test_without_the_extension_one_sentence(command):
    code = "import sys; sys.modules['fastres._C'] = None; from fastres.cli import main; sys.exit(main())"
    run = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True)
    assert "fastres doctor" in run.stdout + run.stderr and "Traceback" not in run.stderr
    assert run.returncode == (0 if command == "--version" else 2)


@pytest.mark.parametrize("command", ["train", "bench", "sweep", "profile", "explain"])
def test_an_unknown_instruction_set(command):
    run = subprocess.run(
        [sys.executable, "-m", "fastres", command],
        env=os.environ | {"FASTRES_CPU_ISA": "foo"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith(f"fastres {command}: FASTRES_CPU_ISA: 'foo' cannot run on this machine")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command, place",
    [
        ("explain --model cifar_resnet20", "fastres.explain_command.explain"),
        ("bench --model cifar_resnet20", "fastres.bench.interleave"),
        ("profile --model cifar_resnet20", "fastres.profiler.measure.trace"),
    ],
)
def test_interrupted_by_the_keyboard(command, place, monkeypatch, capsys, tmp_path):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    written = [] if "explain" in command else ["--json", str(tmp_path / "out.json")]
    small = ["--image-size", "16", "--batch", "2"]
    assert cli.main([*command.split(), *small, *written]) == 130
    captured = capsys.readouterr()
    assert captured.err == f"\nfastres {command.split()[0]}: interrupted\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
def test_output_that_goes_nowhere(redirection):
    command = f"{sys.executable} -m fastres --version {redirection}"
    run = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in run.stderr
    if redirection == ">/dev/full":
        assert run.returncode == 1
        assert run.stderr == "fastres: cannot write its output: No space left on device\n"


def test_signs_that_the_terminal_lacks():
    few = [
        sys.executable,
        "-m",
        "fastres",
        "profile",
        "--from",
        str(Path(__file__).with_name("profile.json")),
    ]
    run = subprocess.run(
        few, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True
    )
    assert run.returncode == 0 and "?" in run.stdout, run.stderr

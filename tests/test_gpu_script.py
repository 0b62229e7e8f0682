"""benchmarks/gpu.sh with stand-ins for the programs that it calls, and the report that it prints."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# Of nvcc 13.0; the second kernel's spills are made up.
PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z10statisticsPf' for 'sm_90a'
ptxas info    : Function properties for _Z10statisticsPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compile time = 12.345 ms
ptxas info    : Compiling entry function '_Z5applyIfLi4EEvPT_' for 'sm_90a'
ptxas info    : Function properties for _Z5applyIfLi4EEvPT_
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 16 bytes cumulative stack size
"""

# Everything that gpu.sh calls through $PYTHON, but for its report.
PYTHON = f"""\
#!/bin/sh
case "$*" in
    *gpu_report*) exec {sys.executable} "$@" ;;
    *doctor*) echo the doctor is ill; exit 3 ;;
    *setup.py*) cat ptxas.txt ;;
esac
echo "$*"
"""


@pytest.fixture
def report():
    spec = spec_from_file_location("gpu_report", BENCHMARKS / "gpu_report.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path):
    """A copy of the script among stand-ins, where it can neither build nor remove anything."""
    (tmp_path / "benchmarks").mkdir()
    for name in ("gpu.sh", "gpu_report.py"):
        shutil.copy(BENCHMARKS / name, tmp_path / "benchmarks")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_ops.py").write_text("def test_op(device): ...\n")
    (tmp_path / "ptxas.txt").write_text(PTXAS)
    for name, text in {
        "python": PYTHON,
        "nvcc": "#!/bin/sh\n",
        "nvidia-smi": "#!/bin/sh\necho Some GPU, 9.0, 81559\n",
        "compute-sanitizer": '#!/bin/sh\necho "$*"; [ $2 != racecheck ]\n',
    }.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(tree, *words):
    path = f"{tree / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHON": "python", "OUT": str(tree / "out")}
    command = ["bash", tree / "benchmarks" / "gpu.sh", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_reads_ptxas_report(report):
    spilling, plain = report.kernels(PTXAS)
    assert spilling == {
        "kernel": "apply<float, 4>",
        "architecture": "sm_90a",
        "registers": 255,
        "shared_bytes": 0,
        "stack_bytes": 16,
        "spill_bytes": 20,
    }
    assert plain["kernel"] == "statistics" and plain["shared_bytes"] == 1024


def test_shortens_kernel_names(report, monkeypatch):
    monkeypatch.setattr(report.shutil, "which", lambda _: None)
    assert report.demangled(["_Z10statisticsPf"]) == ["_Z10statisticsPf"]


def test_a_failing_stage_is_told_and_does_not_stop_the_later_ones(tree):
    done = run(tree, "--quick")
    assert done.returncode == 1, done.stderr
    (path,) = (tree / "out").glob("*.json")
    assert path.name.startswith("some-gpu-")
    result = json.loads(path.read_text())
    outcomes = {stage["stage"]: stage["outcome"] for stage in result["stages"]}
    failed = {"doctor": "FAILED with status 3", "racecheck": "FAILED with status 1"}
    fine = [
        "build",
        "tests",
        "memcheck",
        "initcheck",
        "synccheck",
        "channels_last",
        "contiguous",
        "profile",
    ]
    steps = [f"{model}-{mode}" for model in ("resnet50", "resnet18") for mode in ("train", "infer")]
    assert outcomes == {**dict.fromkeys([*fine, *steps], "ok"), **failed}
    assert "the doctor is ill" in done.stdout
    assert len(result["kernels"]) == 2 and "2 kernels, at most 255 registers, 1 with spills" in done.stdout
    log = path.with_suffix(".log").read_text()
    assert log.count("the doctor is ill") == 1 and "--mode infer --batch 256" in log
    assert "--device cuda --dtype bf16" in log


def test_without_a_gpu_it_is_a_dry_run(tree):
    (tree / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho no driver; exit 9\n")
    (tree / "bin" / "python").write_text(PYTHON.replace("exit 3", "exit 0"))
    done = run(tree)
    assert done.returncode == 0, done.stdout
    assert "only the command lines were checked of: tests channels_last" in done.stdout
    log = (tree / "build" / "gpu-dry-run.log").read_text()
    assert "--model resnet18 --mode infer" in log and "--device cpu --model cifar_resnet20" in log
    assert not list((tree / "out").iterdir())  # where measurements go


def test_tuning_builds_and_tunes_and_does_nothing_else(tree):
    done = run(tree, "--tune")
    assert done.returncode == 0, done.stdout
    logs = {path.stem for path in (tree / "build" / "gpu").glob("*.log")}
    assert logs == {"build", "tune"}
    assert re.search(r"tune.py --device cuda --json \S+/out/some-gpu-[\d-]+-tune.json\n", done.stdout)


def test_tuning_without_a_gpu_is_a_dry_run(tree):
    (tree / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    done = run(tree, "--tune")
    assert done.returncode == 0 and "checked" in done.stdout, done.stdout
    assert "/build/gpu-dry-run-tune.json --device cpu" in done.stdout


def test_other_models(tree):
    done = run(tree, "--models")
    assert done.returncode == 0, done.stdout
    log = next((tree / "out").glob("some-gpu-*-models.log")).read_text()
    assert "--model resnet50 --batch 32 --cuda-graph --against eager,compile-reduce-overhead" in log
    assert "--model resnet152 --batch 128 --against eager,compile" in log
    assert "--mode infer --batch 1 --cuda-graph --against eager,compile-max-autotune" in log
    assert "--mode infer --batch 256 --against eager,compile-max-autotune" in log
    assert "doctor" not in log and "bandwidth" not in log


def test_an_unknown_argument_gets_a_sentence(tree):
    done = run(tree, "--fast")
    assert done.returncode == 2
    assert "unknown argument '--fast'" in done.stderr and not (tree / "build").exists()


def test_tests_that_run_out_of_time_tell_what_failed():
    few = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "unknown or shortens"]
    done = subprocess.run([*few, "-v", "--stop-after", "0"], capture_output=True, text=True, timeout=120)
    assert "1 passed" in done.stdout and "out of time" in done.stdout, done.stdout

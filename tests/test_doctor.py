"""`fastres doctor`: well where all is well, and not where something is broken on purpose."""

import os
import subprocess
import sys

import pytest
import torch

from fastres import _C, cases, choice, doctor, kernels, ops


def run(capsys):
    status = doctor.run()
    return status, capsys.readouterr().out


def verdicts(printed):
    return {
        words[0]: words[1]
        for words in map(str.split, printed.splitlines())
        if words[1:2] and words[0] in OPS
    }


OPS = doctor._OPS


def test_all_is_well(capsys):
    status, printed = run(capsys)
    assert status == 0 and printed.endswith("All is well.\n")
    assert verdicts(printed) == dict.fromkeys(OPS, "ok")
    assert torch.__version__ in printed


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output):
        return output.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.1


def shifted_statistics(op):
    def wrong(input, *arguments):
        output = op(input, *arguments)
        arguments[0].add_(1e-3)
        return output

    return wrong


FAULTS = {
    "a value": ("bn_relu", "output", lambda op: lambda *a, **k: op(*a, **k) + 0.01),
    "one element": ("bn_add_relu", "output", lambda op: lambda *a, **k: _first_is(op(*a, **k), 3.0)),
    "nan": ("add_relu", "output", lambda op: lambda *a, **k: _first_is(op(*a, **k), float("nan"))),
    "a gradient": (
        "conv_bn_relu",
        "grad of weight",
        lambda op: lambda *a, **k: WrongGradient.apply(op(*a, **k)),
    ),
    "running statistics": ("batch_norm", "running_mean", shifted_statistics),
    "dtype": ("bn_relu", "output bfloat16", lambda op: lambda *a, **k: op(*a, **k).float()),
    "an exception": ("add_relu", "RuntimeError: broken", lambda op: _raises),
}


def _first_is(output, value):
    mask = torch.zeros_like(output)
    mask.view(-1)[0] = 1
    return output * (1 - mask) + value * mask


def _raises(*_):
    raise RuntimeError("broken\nin two lines")


@pytest.mark.parametrize("name, words, plant", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_turns_the_verdict(name, words, plant, capsys, monkeypatch):
    monkeypatch.setattr(ops, name, plant(getattr(ops, name)))
    status, printed = run(capsys)
    assert status == 1 and "1 problem, see FAILED above." in printed
    assert verdicts(printed) == {**dict.fromkeys(OPS, "ok"), name: "FAILED"}
    assert words in printed


def test_the_kernels_are_what_is_tested(few_values, capsys, monkeypatch):
    def doubled(*arguments):
        output, *rest = kernels.bn_act(*arguments)
        return 2 * output, *rest

    monkeypatch.setattr(kernels, "few_values", few_values)
    monkeypatch.setattr(ops, "bn_act", doubled)
    _, printed = run(capsys)
    assert kernels.few_values == few_values
    assert [name for name, verdict in verdicts(printed).items() if verdict == "FAILED"] == [
        name for name in OPS if name != "add_relu"
    ]


def test_a_convolution_that_no_kernel_runs_is_a_problem(capsys, monkeypatch):
    monkeypatch.setattr(choice, "for_ours", lambda *_: None)
    _, printed = run(capsys)
    expected = "FAILED" if _C.convolves("float32") else "ok"
    assert verdicts(printed) == {**dict.fromkeys(OPS, "ok"), "conv_bn_relu": expected}


def test_an_op_that_no_kernel_runs_is_a_problem(capsys, monkeypatch):
    monkeypatch.setattr(cases, "why_no_kernel", lambda *_: "of the test")
    status, printed = run(capsys)
    assert status == 1 and "no kernel ran: of the test" in printed


def test_a_missing_op_is_a_problem(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_KERNELS", (*doctor._KERNELS, "gone_forward"))
    status, printed = run(capsys)
    assert status == 1 and "not registered: gone_forward" in printed


def test_an_instruction_set_that_cannot_be_forced_is_a_problem():
    command = [sys.executable, "-m", "fastres", "doctor"]
    env = os.environ | {"FASTRES_CPU_ISA": "sse9"}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 1 and not run.stderr
    assert "CPU kernels   FAILED  FASTRES_CPU_ISA: 'sse9' cannot run on this machine" in run.stdout
    assert "Unset FASTRES_CPU_ISA" in run.stdout and "1 problem, see FAILED above." in run.stdout


def test_an_extension_that_cannot_be_imported_is_told_about(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastres._C", None)
    status, printed = run(capsys)
    assert status == 1 and "extension     FAILED" in printed and "pip install" in printed


def test_why_the_extension_is_missing(tmp_path, monkeypatch):
    error = ImportError("undefined symbol: aoti_torch_x")
    suffix = doctor.sysconfig.get_config_var("EXT_SUFFIX")
    assert "it was not built" in doctor.why_no_extension(error, tmp_path)[0]
    (tmp_path / "_C.cpython-27-z80.so").touch()
    assert "_C.cpython-27-z80.so is for another Python" in doctor.why_no_extension(error, tmp_path)[0]
    (tmp_path / f"_C{suffix}").touch()
    assert "cannot be loaded: undefined symbol: aoti_torch_x" in doctor.why_no_extension(error, tmp_path)[0]
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert "needs 2.10 or later" in doctor.why_no_extension(error, tmp_path)[0]

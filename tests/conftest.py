"""Fixtures shared by all tests."""

import contextlib
import re
import shutil
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from convolving import BY_GROUPS, BY_WINOGRAD, DIRECTLY
from emulated_ops import cuda_kernels_on_the_host
from layers import DTYPES, units
from PIL import Image
from torch import library
from torch.utils.data import TensorDataset

from fastres import _C, choice, convolution, kernels, residual_blocks, sequences, tuning
from fastres.recompute import set_recompute
from fastres.train import data as train_data

_STARTED = time.monotonic()


def pytest_addoption(parser):
    parser.addoption("--stop-after", type=float, metavar="SECONDS", help="begin no test after that time")


def pytest_runtest_teardown(item):
    """Out of time, what has failed is to be told: a process that is killed says nothing."""
    most = item.config.getoption("--stop-after")
    if most is not None and time.monotonic() - _STARTED > most:
        item.session.shouldstop = "out of time"


_declared = []  # keeps the library's registrations alive


def _declare_torchvision_ops() -> None:
    """Torchvision asks for its operators' names, not for kernels."""
    source = (Path(find_spec("torchvision").origin).parent / "_meta_registrations.py").read_text()
    registry = library.Library("torchvision", "DEF")
    for name in sorted(set(re.findall(r'"(?:torchvision::)?([a-z_0-9]+)"', source))):
        registry.define(f"{name}(Tensor input) -> Tensor")
    _declared.append(registry)


@pytest.fixture(scope="session")
def torchvision():
    """Also one that was built for another torch."""
    try:
        return import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[module]
    _declare_torchvision_ops()
    return import_module("torchvision")


@pytest.fixture(scope="session")
def timm(torchvision):
    return import_module("timm")


@pytest.fixture(scope="session")
def transformers(torchvision):  # which it imports where it is installed
    return import_module("transformers")


@pytest.fixture(
    params=[
        "cpu",
        "emu",
        *(pytest.param(name, marks=pytest.mark.cuda) for name in ("cuda", "cuda_other_launches")),
    ]
)
def device(request, monkeypatch):
    """Where a test's tensors are; on CUDA also with batch norms that read theirs once, and overlap else.

    "emu" is the CPU with the kernels of CUDA.
    """
    if request.param == "cpu":
        yield "cpu"
        return
    if request.param == "emu":
        with cuda_kernels_on_the_host(monkeypatch):
            yield "cpu"
        return
    if not (torch.cuda.is_available() and _C.build_info()["cuda"]):
        pytest.skip("no CUDA device, or fastres was built without CUDA")
    others = request.param == "cuda_other_launches"
    _C.use_on_chip(int(others))
    _C.overlap_launches(others)
    yield "cuda"
    _C.use_on_chip(0)
    _C.overlap_launches(False)


@pytest.fixture
def emulated(request) -> bool:
    """Whether the device is "emu", whose kernels add up in float: on the CPU, PyTorch does in double."""
    return request.node.callspec.params.get("device") == "emu"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1234)


@pytest.fixture(autouse=True)
def few_values(monkeypatch):
    """None are too few for the kernels: the tests' tensors are small. The usual number, for tests of it."""
    usual = kernels.few_values
    monkeypatch.setattr(kernels, "few_values", 0)
    return usual


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    """What holds for a layer or block each test finds out anew, which may change what it depends on."""
    monkeypatch.setattr(choice, "_known", {})
    monkeypatch.setattr(residual_blocks, "_known", {})


@pytest.fixture(autouse=True)
def _no_measured_choices(monkeypatch):
    """What somebody measured on this machine does not decide what is tested."""
    monkeypatch.setattr(tuning, "mode", "off")


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def _selected(isa):
    before = _C.cpu_isa()
    _C.select_cpu_isa(isa)
    yield isa
    _C.select_cpu_isa(before)


@pytest.fixture(params=_C.cpu_isas())
def any_isa(request):
    """An instruction set, selected."""
    with _selected(request.param) as isa:
        yield isa


@pytest.fixture(params=[isa for isa, dtype in units() if dtype == "float32"])
def isa(request):
    """One that has convolutions, selected."""
    with _selected(request.param) as isa:
        yield isa


@pytest.fixture(params=units(), ids="-".join)
def unit(request):
    """Selects an instruction set; the dtype that it is to convolve."""
    with _selected(request.param[0]):
        yield DTYPES[request.param[1]]


@pytest.fixture(params=[1, 2], ids=["1_thread", "2_threads"])
def threads(request, one_thread):
    torch.set_num_threads(request.param)
    return request.param


@pytest.fixture(params=[DIRECTLY, BY_WINOGRAD, BY_GROUPS], ids=["direct", "winograd", "groups"])
def way(request, unit):
    """How convolutions are multiplied, 3x3 ones of few pixels as well."""
    _C.use_winograd(request.param.use_winograd)
    yield request.param.covered(str(unit).removeprefix("torch."))
    _C.use_winograd("faster")


@pytest.fixture
def small_layers(monkeypatch):
    """Run by our convolutions, from wherever they are the faster ones."""
    monkeypatch.setattr(convolution, "_LEAST_CHANNELS", 16)


@pytest.fixture(params=[True, False], ids=["recompute", "keep"])
def recompute(request):
    before = set_recompute(request.param)
    yield request.param
    set_recompute(before)


@pytest.fixture(scope="module")
def few():
    """Digits enough for a few batches."""
    digits = train_data.digits()
    digits.train, digits.test = (TensorDataset(*part[:48]) for part in (digits.train, digits.test))
    return digits


@pytest.fixture
def folder_of_images(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            size = (40 + 3 * i, 50, 3)
            pixels = torch.randint(0, 128, size, generator=generator) + (100 if name == "dog" else 0)
            Image.fromarray(pixels.byte().numpy()).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture(scope="session")
def browser():
    """A real one, without a window."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser is installed, of {', '.join(names)}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def ran(monkeypatch):
    """How many convolutions each sequence of a model that ran had."""
    counts, run = [], sequences._run
    monkeypatch.setattr(sequences, "_run", lambda *args: counts.append(len(args[3])) or run(*args))
    return counts


@pytest.fixture
def quick_limits(monkeypatch, tmp_path):
    """The profiler's limits of the machine, not measured, and kept nowhere but here."""
    limits = import_module("fastres.profiler.limits")
    monkeypatch.setattr(limits, "_SECONDS", 0.0)
    monkeypatch.setattr(limits, "_flops", lambda dtype, device: 1e11)
    monkeypatch.setattr(limits, "_copy_speed", lambda bytes, device: 1e10 if bytes < 2**25 else 5e9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

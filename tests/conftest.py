"""Fixtures shared by all tests."""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fastres import _C

_declared = []  # keeps the library's registrations alive


def _declare_torchvision_ops() -> None:
    """Let a torchvision built for another torch import: it asks for its operators' names, not kernels."""
    if _declared or hasattr(torch.ops.torchvision, "nms"):
        return
    source = (Path(find_spec("torchvision").origin).parent / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(set(re.findall(r'"(?:torchvision::)?([a-z_0-9]+)"', source))):
        library.define(f"{name}(Tensor input) -> Tensor")
    _declared.append(library)


@pytest.fixture(scope="session")
def torchvision():
    _declare_torchvision_ops()
    return import_module("torchvision")


@pytest.fixture(scope="session")
def timm():
    _declare_torchvision_ops()
    return import_module("timm")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> str:
    if request.param == "cuda" and not (torch.cuda.is_available() and _C.build_info()["cuda"]):
        pytest.skip("no CUDA device, or fastres was built without CUDA")
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1234)

"""Models by name: fastres's, other libraries', a user's functions, and a sentence for every failure."""

import sys

import pytest
import torch
from torch import nn

from fastres import models
from fastres.fuse import is_fused
from fastres.models.by_name import build


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "@dataclass\n"
        "class Width:\n"
        "    channels: int = 4\n"
        "def small():\n"
        "    return nn.Sequential(nn.Conv2d(3, Width().channels, 3), nn.BatchNorm2d(4), nn.ReLU())\n"
        "def broken():\n"
        "    raise KeyError('gone')\n"
        "def number():\n"
        "    return 3\n"
        "constant = 3\n"
    )
    return path


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_one_of_fastres():
    assert type(build("cifar_resnet20")) is type(models.cifar_resnet20())


def test_torchvisions(torchvision):
    assert type(build("torchvision:resnet18")) is torchvision.models.ResNet


def test_timms(timm):
    model = build("timm:resnet18")
    assert type(model).__module__ == "timm.models.resnet"
    assert not any(is_fused(module) for module in model.modules())


@pytest.mark.parametrize(
    "name, count",
    [
        # torchvision's of the same depth; 26: timm's
        ("resnet-18", 11_689_512),
        ("resnet-26", 15_995_176),
        ("resnet-34", 21_797_672),
        ("resnet-50", 25_557_032),
        ("resnet-101", 44_549_160),
        ("resnet-152", 60_192_808),
    ],
)
def test_transformers_have_the_published_sizes(name, count, torchvision):
    with torch.device("meta"):
        assert parameters(build(f"transformers:{name}")) == count


def test_a_function_of_a_file(file):
    assert isinstance(build(f"{file}:small")[1], nn.BatchNorm2d)


def test_a_file_does_not_hide_a_module_of_its_name(file):
    path = file.rename(file.with_name("json.py"))
    before = sys.modules.get("json")
    build(f"{path}:small")
    assert sys.modules.get("json") is before


def test_a_function_of_a_module():
    assert type(build("fastres.models.cifar:cifar_resnet20")) is type(models.cifar_resnet20())


BAD = {
    "resnet5": "there is no such model; did you mean resnet50?",
    "ResNet18": "there is no such model; did you mean resnet18?",
    "nope": "there is no such model; there are resnet18, ",
    "": "there is no such model; there are resnet18, ",
    "net.py": "expected a function of that file as well, net.py:function",
    "transformers:resnet-19": "no such model of transformers is known; did you mean resnet-18?",
    "transformers:nope": "there are resnet-18, resnet-26, ",
    "torchvision:resnet500": "torchvision has no such classifier; did you mean resnet50?",
    "torchvision:fasterrcnn_resnet50_fpn": "torchvision has no such classifier; ",
    "torchvision:": "torchvision.models.list_models() lists them",
    "timm:resnet51x": "timm has no such model; did you mean resnet51q?",
    "timm:hf-hub:someone/something": "timm has no such model; ",
    "timm:resnet50.nope": "building it raised RuntimeError: Invalid pretrained tag",
    "os:getcwd": "it returns str, expected torch.nn.Module",
    "os:getcmd": "os has no function 'getcmd'; did you mean getcwd?",
    "os:": "os has no function ''; there are ",
    "os:sep": "os:sep has type str, expected a function",
    "no_such_package:f": "no_such_package is not installed",
    "no_such_package.part:f": "no_such_package is not installed",
    "os.nope:f": "os.nope cannot be imported: ModuleNotFoundError: ",
    ":f": "cannot be imported: ValueError: Empty module name",
    ".relative:f": "cannot be imported: TypeError: ",
    "{}:broken": "building it raised KeyError: 'gone'",
    "{}:number": "it returns int, expected torch.nn.Module",
    "{}:smal": "has no function 'smal'; did you mean small?",
    "{}:constant": ":constant has type int, expected a function",
    "{}/net.py:small": "there is no file ",
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_built_gets_one_sentence(name, file, request):
    if name.startswith(("torchvision", "timm")):
        request.getfixturevalue("torchvision")
    with pytest.raises(ValueError) as caught:
        build(name.format(file))
    assert BAD[name] in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text, words",
    [("def f(:\n", "SyntaxError: "), ("1 / 0\n", "ZeroDivisionError: "), ("exit(3)\n", "SystemExit: 3")],
)
def test_a_file_that_cannot_be_imported(text, words, tmp_path):
    (tmp_path / "net.py").write_text(text)
    with pytest.raises(ValueError, match=f"net.py cannot be imported: {words}"):
        build(f"{tmp_path}/net.py:f")


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18", "transformers:resnet-18"])
def test_a_library_that_is_not_installed(name, monkeypatch):
    library = name.partition(":")[0]
    for module in [module for module in sys.modules if module.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(ValueError, match=f"{library} is not installed"):
        build(name)

"""Which convolution a layer gets: the rule, what was measured, and the file in which that is kept."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.utils.checkpoint
from layers import FLOAT32, PRECISIONS, Case, channels_last, is_node

import fastres
from fastres import choice, convolution, files, ops, tuning
from fastres.tuning import Layer, Table, Times

pytestmark = pytest.mark.usefixtures("one_thread")

OURS, PYTORCHS = Times(1.0, 2.0), Times(2.0, 1.0)


def layer(channels: int = 64) -> Layer:
    shapes = (8, 32, 17, 15), (channels, 32, 3, 3), (1, 1), (1, 1), (1, 1)
    return Layer(True, "float32", "float32", *shapes, True, True, True, False, 1)


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "table", Table(tmp_path / "fastres" / "convolutions.json"))
    return tuning.table


@pytest.fixture
def measured(monkeypatch):
    """Layers that are measured, and what is found: at first that PyTorch's is the faster one."""
    found = {"layers": [], "times": PYTORCHS}

    def measure(layer):
        found["layers"].append(layer)
        return found["times"]

    monkeypatch.setattr(tuning, "measure", measure)
    return found


def use(monkeypatch, mode: str) -> None:
    monkeypatch.setattr(tuning, "mode", mode)


def runs_ours(case) -> bool:
    return is_node(ops.conv_bn_relu(**case.leaves(), **case.by))


@pytest.mark.parametrize("mode", ["off", "cached"])
def test_by_rule_where_nothing_was_measured(mode, table, measured, monkeypatch):
    use(monkeypatch, mode)
    assert runs_ours(Case()) and not runs_ours(Case(channels=(16, 16)))
    assert not measured["layers"] and not table.path.exists()


def test_a_layer_is_measured_once(table, measured, monkeypatch):
    use(monkeypatch, "on")
    case = Case()
    assert not runs_ours(case) and not runs_ours(case)
    assert measured["layers"] == [layer()]
    assert not runs_ours(Case(channels=(32, 65)))
    assert measured["layers"] == [layer(), layer(65)]
    measured["times"] = OURS
    assert runs_ours(Case(channels=(16, 16)))
    # As another process would find it, which may not measure.
    use(monkeypatch, "cached")
    monkeypatch.setattr(tuning, "table", Table(table.path))
    assert not runs_ours(case) and runs_ours(Case(channels=(16, 16))) and runs_ours(Case(channels=(32, 66)))
    assert len(measured["layers"]) == 3
    use(monkeypatch, "off")
    assert runs_ours(case) and not runs_ours(Case(channels=(16, 16)))


def test_what_counts_for_another_layer(table, measured, monkeypatch):
    use(monkeypatch, "on")
    for case in (
        Case(),
        Case(residual=False),
        Case(training=False),
        Case(stride=2),
        Case(batch=4),
        Case(kernel=1),
        Case(PRECISIONS["bfloat16-autocast"]),
    ):
        with case.precision.context():
            ops.conv_bn_relu(**case.leaves(), **case.by)
            ops.conv_bn_relu(**case.leaves(wanted=("weight",)), **case.by)
            with torch.no_grad():
                ops.conv_bn_relu(**case.leaves(), **case.by)
    layers = measured["layers"]
    assert len(set(layers)) == len(set(map(str, layers))) == len(layers)
    # In evaluation only without a gradient there is a choice; in bf16 only where there are kernels.
    assert len(layers) == 5 * 3 + 1 + 3 * PRECISIONS["bfloat16-autocast"].convolves


def test_a_convolution_of_images_that_was_measured_to_be_slower(table, measured, monkeypatch):
    """In evaluation it is PyTorch's, as a whole."""
    use(monkeypatch, "on")
    monkeypatch.setattr(convolution, "_MANY_VALUES", 1)
    monkeypatch.setattr(convolution, "_LEAST_CHANNELS", 32)
    ours = []
    monkeypatch.setattr(convolution, "_forward", lambda *arguments: ours.append(arguments))
    case = Case(training=False, residual=False, channels=(3, 32))
    with torch.no_grad():
        output = ops.conv_bn_relu(**case.leaves(), **case.by)
    assert len(measured["layers"]) == 1 and output.shape[1] == 32 and not ours


def test_a_difference_that_is_noise_leaves_the_rule(table, monkeypatch):
    use(monkeypatch, "cached")
    for times, by_rule in ((Times(1.0, 1.02), False), (Times(1.02, 1.0), True)):
        table.add(layer(), times)
        assert tuning.takes_ours(layer(), by_rule) is by_rule
    table.add(layer(), Times(1.0, 1.1))
    assert tuning.takes_ours(layer(), False)


CASES = {
    "training": lambda: Case(),
    "strided": lambda: Case(residual=False, stride=2),
    "evaluation": lambda: Case(training=False),
    "groups": lambda: Case(channels=(32, 32), groups=8),
    "autocast": lambda: Case(PRECISIONS["bfloat16-autocast"]),
    "narrow": lambda: Case(PRECISIONS["float16"], channels=(16, 24)),
}


def step(case, grad: bool):
    """Output, gradients and statistics afterwards, and whether a convolution of ours ran."""
    with case.precision.context(), torch.set_grad_enabled(grad):
        leaves = case.leaves()
        output = ops.conv_bn_relu(**leaves, **case.by)
    if grad:
        output.backward(case.grad)
    grads = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    return [output.detach(), *grads, leaves["running_mean"], leaves["running_var"]], is_node(output)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grad", [True, False])
def test_measuring_leaves_no_trace(name, grad, table, monkeypatch):
    """But its times: no random number is used up, and what is computed is what is computed without."""
    use(monkeypatch, "on")
    case, kept, measure = CASES[name](), [], tuning.measure
    monkeypatch.setattr(tuning, "measure", lambda layer: kept.append(measure(layer)) or kept[-1])
    state = torch.random.get_rng_state()
    first, ours = step(case, grad)
    assert torch.equal(torch.random.get_rng_state(), state)
    second, again = step(case, grad)  # by what is known by now
    assert ours == again and all(map(torch.equal, first, second))
    # In evaluation only without a gradient there is a choice.
    assert len(kept) == (case.precision.convolves and (case.by["training"] or not grad))
    for times in kept:
        assert 0 < times.ours < 10 and 0 < times.pytorch < 10


@pytest.mark.parametrize("times", [OURS, PYTORCHS], ids=["ours", "pytorch's"])
def test_measuring_is_not_told(times, table, monkeypatch):
    """To whoever records the site in whose call it happens."""
    use(monkeypatch, "on")
    medians = tuning._medians
    monkeypatch.setattr(tuning, "_medians", lambda layer: medians(layer) and times)
    model = fastres.models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    x = channels_last(torch.randn(2, 3, 64, 64))
    assert str(fastres.explain(model, x)) == str(fastres.explain(model, x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant, table, monkeypatch):
    use(monkeypatch, "on")
    conv, bn = torch.nn.Conv2d(32, 32, 3, padding=1, bias=False), torch.nn.BatchNorm2d(32)
    x = channels_last(torch.randn(4, 32, 9, 8)).requires_grad_()

    def layer(x):
        return fastres.sites.conv_bn_act(conv, bn, None, x, relu=True)

    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert x.grad is not None and conv.weight.grad is not None


def test_two_threads_at_once(table, monkeypatch):
    use(monkeypatch, "on")
    model = fastres.models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    images = [channels_last(torch.randn(2, 3, side, side)) for side in (48, 64)]
    with ThreadPoolExecutor(2) as threads:
        outputs = list(threads.map(model, images))
    assert [output.shape for output in outputs] == [(2, 10)] * 2
    assert tuning._forced.ours is None


def test_under_another_default_dtype(table, monkeypatch):
    use(monkeypatch, "on")
    case = Case()
    torch.set_default_dtype(torch.float64)
    try:
        ops.conv_bn_relu(**case.leaves(), **case.by)
    finally:
        torch.set_default_dtype(torch.float32)
    assert table.get(layer()) is not None


def test_a_layer_that_cannot_be_measured(table, monkeypatch):
    use(monkeypatch, "on")

    def measure(layer):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(tuning, "measure", measure)
    with pytest.warns(
        UserWarning, match="8x32x17x15 by 64x32x3x3.* could not be measured: not enough memory"
    ):
        assert runs_ours(Case())
    assert not table.path.exists()


def test_in_inference_mode(table, monkeypatch):
    use(monkeypatch, "on")
    model = fastres.optimize_for_inference(fastres.models.resnet18(num_classes=10))
    were_kept = []
    is_kept = choice.is_kept
    monkeypatch.setattr(
        choice, "is_kept", lambda weight: were_kept.append(is_kept(weight)) or were_kept[-1]
    )
    with torch.inference_mode():
        output = model(channels_last(torch.randn(1, 3, 64, 64)))
    assert output.shape == (1, 10)
    (layers,) = json.loads(table.path.read_text()).values()
    assert len(layers) > 5 and all("packed" in name and "infer" in name for name in layers)
    assert all(were_kept)  # in the measured calls too


def test_several_processes_lose_nothing(tmp_path):
    path = tmp_path / "new" / "convolutions.json"
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(tmp_path.parent)!r})
from fastres.tuning import Layer, Table, Times
table = Table(Path({str(path)!r}))
for i in range(15):
    shapes = (8, 32, 17, 15), (int(sys.argv[1]) * 100 + i, 32, 3, 3), (1, 1), (1, 1), (1, 1)
    table.add(Layer(True, "float32", "float32", *shapes, True, True, True, False, 1), Times(1, 2))
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(i)]) for i in range(3)]
    assert [process.wait(timeout=100) for process in processes] == [0] * 3
    (layers,) = json.loads(path.read_text()).values()
    assert len(layers) == 45
    again = Table(path)
    assert all(again.get(layer(i * 100 + j)) == (1, 2) for i in range(3) for j in range(15))


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"a": 3}', '{"a": {"b": [1]}}', '{"a": {"b": ["x", 2]}}']
)
def test_a_broken_file_is_made_anew(text, tmp_path):
    path = tmp_path / "convolutions.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="convolutions.json cannot be read and is made anew"):
        assert Table(path).get(layer()) is None
    with pytest.warns(UserWarning, match="is made anew"):
        Table(path).add(layer(), OURS)
    assert Table(path).get(layer()) == OURS


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    table = Table(tmp_path / "file" / "convolutions.json")
    with pytest.warns(UserWarning, match="what was measured is not kept"):
        table.add(layer(), OURS)
    assert table.get(layer()) == OURS  # for this process


@pytest.mark.parametrize("value, warns", [("cached", False), ("on", False), ("off", False), ("yes", True)])
def test_the_environment(value, warns, tmp_path):
    code = "from fastres import tuning; print(tuning.mode, tuning.table.path)"
    environment = {"FASTRES_TUNE": value, "XDG_CACHE_HOME": str(tmp_path), "PATH": ""}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    mode = "cached" if warns else value
    assert answer.stdout.split() == [mode, str(tmp_path / "fastres" / "convolutions.json")]
    assert ("FASTRES_TUNE=yes is none of cached, on, off; taken as cached" in answer.stderr) == warns


def test_explain_tells_whose_convolutions_run(table, measured, monkeypatch):
    model = fastres.models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    x = channels_last(torch.randn(2, 3, 64, 64))
    if not FLOAT32.convolves:
        pytest.skip("this machine has no convolutions")
    assert str(fastres.explain(model, x)).endswith("\n19 of 20 fused convolutions are fastres's own")
    told = str(fastres.explain(fastres.models.resnet18(num_classes=10), x.contiguous()))
    assert re.search(
        r"\n0 of \d+ fused .* own; 19 would be in channels_last memory: model.to\(memory_", told
    )
    use(monkeypatch, "on")
    assert str(fastres.explain(model, x)).endswith("\n0 of 20 fused convolutions are fastres's own")


def test_without_a_home(monkeypatch, tmp_path):
    """As in some containers; it is asked for when fastres is imported."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(files.Path, "home", no_home)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    assert files.cache_path("convolutions.json") == tmp_path / "fastres" / "convolutions.json"

"""A residual block's two gradients of its input, added up where the second of them is stored."""

import threading

import pytest
import torch
from layers import channels_last
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from fastres import joining, models, sites

CHANNELS = 32


class Block(torch.nn.Module):
    """Two layers, and a projection where there is a stride, behind a layer: its input is no leaf."""

    def __init__(self, stride=1):
        super().__init__()
        kernels, strides = (1, 3, 1, 1), (1, stride, 1, stride)
        self.convs = torch.nn.ModuleList(
            torch.nn.Conv2d(CHANNELS, CHANNELS, k, stride=s, padding=k // 2, bias=False)
            for k, s in zip(kernels, strides, strict=True)
        )
        self.bns = torch.nn.ModuleList(torch.nn.BatchNorm2d(CHANNELS) for _ in kernels)
        self.stride = stride

    def layer(self, i, x, residual=None, relu=True):
        return sites.conv_bn_act(self.convs[i], self.bns[i], None, x, residual, relu=relu)

    def begin(self, images):
        return self.layer(0, images)

    def branch(self, x):
        return self.layer(1, x)

    def end(self, x, branch):
        return self.layer(2, branch, self.layer(3, x, relu=False) if self.stride > 1 else x)

    def forward(self, images):
        x = self.begin(images)
        return self.end(x, self.branch(x))


@pytest.fixture(params=[1, 2], ids=["identity", "projection"])
def block(request):
    torch.manual_seed(0)
    return Block(request.param)


@pytest.fixture
def images():
    return channels_last(torch.randn(3, CHANNELS, 9, 8))


def gradients(block, images, call=None):
    block.zero_grad()
    leaf = images.clone().requires_grad_()
    output = (call or block)(leaf)
    (output * torch.arange(output.numel()).view_as(output).cos()).sum().backward()
    return [leaf.grad, *(p.grad for p in block.parameters() if p.grad is not None)]


@pytest.fixture
def apart(monkeypatch):
    """Calls a function with nothing joined."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(joining, "nodes_that_meet", lambda *_: ())
            return function(*arguments)

    return call


def assert_equal(ours, expected):
    assert len(ours) == len(expected) > 1
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


def assert_close_to(ours, expected):
    """Where more than two are added up: in another order, so that the last digits differ."""
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def additions(block, images):
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        gradients(block, images)
    return sum(e.count for e in recorded.key_averages() if e.key in ("aten::add", "aten::add_"))


def test_no_pass_adds_them(block, images, apart):
    gradients(block, images)  # .grad of the parameters is there, or not, in either case
    assert additions(block, images) == apart(additions, block, images) - 1


def test_gradients_are_the_same_to_the_bit(block, images, apart):
    assert_equal(gradients(block, images), apart(gradients, block, images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_the_sum_once(block, images, apart, dtype):
    block, images = block.to(dtype), images.to(dtype)
    for a, b in zip(gradients(block, images), apart(gradients, block, images), strict=True):
        scale = b.double().abs().max()
        assert (a.double() - b.double()).abs().max() <= 2 * torch.finfo(dtype).eps * scale


def test_whole_models(apart):
    for make in (models.resnet18, models.resnet50):
        torch.manual_seed(0)
        model = make(num_classes=10).to(memory_format=torch.channels_last)
        images = channels_last(torch.randn(2, 3, 64, 64))
        assert_equal(gradients(model, images), apart(gradients, model, images))


def test_an_input_that_is_used_once_more(block, images, apart):
    def call(images):
        x = block.begin(images)
        output = block.end(x, block.branch(x))
        return output + x.mean()

    assert_close_to(gradients(block, images, call), apart(gradients, block, images, call))


class AddsWhatItTakes(Block):
    """The last layer takes the projection itself, to which it is added."""

    def forward(self, images):
        x = self.layer(0, images, relu=False)
        return self.layer(1, x, x)


def test_a_layer_that_is_added_to_what_it_takes(images, apart):
    block = AddsWhatItTakes()
    assert_equal(gradients(block, images), apart(gradients, block, images))


def test_two_blocks_from_one_input(block, images, apart):
    def call(images):
        x = block.begin(images)
        branch = block.branch(x)
        return block.end(x, branch) + block.end(x, branch) * 2

    assert_close_to(gradients(block, images, call), apart(gradients, block, images, call))


@pytest.mark.parametrize("cut", ["branch", "shortcut"])
def test_a_path_that_is_cut(block, images, apart, cut):
    def call(images):
        x = block.begin(images)
        branch = block.branch(x)
        return block.end(x.detach(), branch) if cut == "shortcut" else block.end(x, branch.detach())

    assert_equal(gradients(block, images, call), apart(gradients, block, images, call))


def test_hooks_on_the_input_see_the_whole_gradient(block, images, apart):
    def seen():
        gradients_of_input = []

        def call(images):
            x = block.begin(images)
            x.retain_grad()
            x.register_hook(lambda grad: gradients_of_input.append(grad.clone()))
            kept.append(x)
            return block.end(x, block.branch(x))

        kept = []
        gradients(block, images, call)
        return [*gradients_of_input, kept[0].grad]

    assert_equal(seen(), apart(seen))


def test_a_hook_between_that_changes_a_gradient(block, images, apart):
    def call(images):
        x = block.begin(images)
        branch = block.branch(x)
        branch.register_hook(lambda grad: grad * 3)
        return block.end(x, branch)

    assert_equal(gradients(block, images, call), apart(gradients, block, images, call))


@pytest.mark.parametrize("wanted", ["input", "first", "last", "projection", "input and last"])
def test_gradients_of_some(block, images, apart, wanted):
    if wanted == "projection" and block.stride == 1:
        pytest.skip("there is none")
    x = block.begin(images)
    pieces = {
        "input": [x],
        "first": [block.convs[1].weight],
        "last": [block.convs[2].weight],
        "projection": [block.convs[3].weight],
        "input and last": [x, block.convs[2].weight],
    }[wanted]

    def grad():
        output = block.end(x, block.branch(x))
        return torch.autograd.grad(output.square().sum(), pieces, retain_graph=True)

    for a, b in zip(grad(), apart(grad), strict=True):
        assert torch.equal(a, b)


def test_a_second_pass_through_a_retained_graph(block, images, apart):
    def twice():
        loss = block(images).square().sum()
        weights = [block.convs[i].weight for i in range(4 if block.stride > 1 else 3)]
        first = torch.autograd.grad(loss, weights, retain_graph=True)
        second = torch.autograd.grad(loss, weights)
        assert_equal(second, first)
        return first

    assert_equal(twice(), apart(twice))


def test_two_passes_at_the_same_time(block, images, apart):
    """Both are between the sum at the block's end and the branch's first layer when they go on."""
    x = block.begin(images)
    branch = block.branch(x)
    loss = block.end(x, branch).square().sum()
    weights = [block.convs[i].weight for i in range(4 if block.stride > 1 else 3)]
    expected = torch.autograd.grad(loss, weights, retain_graph=True)
    both, found = threading.Barrier(2, timeout=60), [None, None]
    branch.register_hook(lambda grad: both.wait() * 0 + grad)

    def run(i):
        found[i] = torch.autograd.grad(loss, weights, retain_graph=True)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for gradients_of_one in found:
        assert_equal(gradients_of_one, expected)


def test_after_a_pass_that_failed(block, images, apart):
    def failed_and_again():
        x = block.begin(images)
        branch = block.branch(x)
        output = block.end(x, branch)

        def fail(grad):
            raise KeyError("as planted")

        hook = branch.register_hook(fail)
        with pytest.raises(KeyError, match="as planted"):
            output.sum().backward(retain_graph=True)
        hook.remove()
        block.zero_grad()
        output.square().sum().backward()
        return [block.convs[0].weight.grad, block.convs[1].weight.grad]

    assert_equal(failed_and_again(), apart(failed_and_again))


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_activation_checkpointing(block, images, apart, reentrant):
    def call(images):
        return checkpoint(block, images, use_reentrant=reentrant)

    assert_equal(gradients(block, images, call), apart(gradients, block, images))


def test_second_derivatives(block, images, apart):
    """With create_graph nothing is joined: the gradients are PyTorch's ops."""

    def derivatives():
        leaf = images.clone().requires_grad_()
        (first,) = torch.autograd.grad(block(leaf).square().sum(), leaf, create_graph=True)
        return [first, torch.autograd.grad(first.square().sum(), leaf)[0]]

    ours, expected = derivatives(), apart(derivatives)
    assert torch.equal(ours[0], expected[0])
    assert_close_to(ours, expected)

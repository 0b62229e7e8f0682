"""Models that several threads call at once, while others are fused or change."""

import sys
import threading
import time

import pytest
import torch
from sequencing import images, optimized, randomized, without_sequences

import fastres
from fastres import recording, sequences
from fastres.trace import trace

pytestmark = pytest.mark.usefixtures("one_thread")
SECONDS = 2.0


@pytest.fixture(autouse=True)
def hasty_threads():
    """That take turns a thousand times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def side_by_side(*calls):
    """Each in a thread of its own, again and again; what they raised."""
    errors, end = [], time.monotonic() + SECONDS

    def repeat(call):
        try:
            with torch.no_grad():
                while time.monotonic() < end and not errors:
                    call()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def small(torchvision):
    return randomized(torchvision.models.resnet18(num_classes=10))


def test_inference_of_several_sizes(torchvision, monkeypatch):
    model = optimized(small(torchvision))
    inputs = [images(1, side) for side in (32, 40, 48)]
    expected = [without_sequences(model, input) for input in inputs]

    def call(index):
        output = model(inputs[index])
        assert torch.equal(output, expected[index])

    errors = side_by_side(*(lambda i=i % 3: call(i) for i in range(4)))
    assert not errors
    assert not recording._listeners and not recording._records
    ran = []
    run = sequences._run
    monkeypatch.setattr(sequences, "_run", lambda *args: ran.append(1) or run(*args))
    for index in range(3):
        call(index)
        call(index)
    assert len(ran) >= 3 and all(ran)


def test_what_one_thread_records_is_its_own(torchvision):
    model = fastres.fuse(small(torchvision))
    input, counts = images(1, 32), set()

    def record():
        with recording.record() as records:
            model(input)
        counts.add(len(records))

    assert not side_by_side(record, record, lambda: model(input))
    assert counts == {20}


def test_a_model_is_traced_while_another_and_the_same_run(torchvision):
    traced, plain = fastres.fuse(small(torchvision)), small(torchvision)
    input = images(1, 32)
    expected = plain(input)

    def check(model):
        torch.testing.assert_close(model(input), expected, rtol=1e-4, atol=1e-4)

    traced.load_state_dict(plain.state_dict())
    errors = side_by_side(
        lambda: trace(traced, training=False), lambda: check(plain), lambda: check(traced)
    )
    assert not errors


def test_hooks_that_come_and_go_while_others_call(torchvision):
    model, plain = optimized(small(torchvision), images(1, 32)), small(torchvision)
    input = images(1, 32)
    expected = without_sequences(model, input)

    def change():
        handle = model.layer2[0].bn1.register_forward_hook(lambda *_: None)
        time.sleep(0.01)
        handle.remove()
        time.sleep(0.01)

    def check():
        torch.testing.assert_close(model(input), expected, rtol=1e-4, atol=1e-4)

    assert not side_by_side(change, check, check, lambda: plain(input))


def test_gradients_of_one_graph():
    """Each pass forgets what it took, and not what another one is about to use."""
    model = fastres.models.cifar_resnet20().train()
    loss, parameters = model(images(2, 8)).sum(), list(model.parameters())
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)

    def walk():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        assert all(map(torch.equal, gradients, expected))

    assert not side_by_side(*[walk] * 6)

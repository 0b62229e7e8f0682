"""The memory of large results: used again, bounded, and safe to hand around."""

import gc
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fastres
from fastres import _C, memory, ops

MB = 2**20


@pytest.fixture(autouse=True)
def empty():
    """Begin with nothing kept: the tests use sizes of whole huge pages, so that gaps can be counted."""
    gc.collect()
    fastres.empty_cache()
    used, idle = _C.memory()
    assert used == 0 and idle == 0
    yield
    fastres.empty_cache()


def result(megabytes: float) -> torch.Tensor:
    """Of a fused op."""
    input = torch.ones(int(megabytes * MB / 4))
    return torch.ops.fastres.add_relu_forward(input.view(1, -1), input.view(1, -1))


def test_freed_memory_is_used_again():
    first = result(8)
    address = first.data_ptr()
    del first
    assert result(8).data_ptr() == address


def test_a_freed_block_is_divided():
    first = result(16)
    address = first.data_ptr()
    del first
    parts = [result(4), result(12)]
    assert [part.data_ptr() for part in parts] == [address, address + 4 * MB]
    assert _C.memory() == (16 * MB, 0)


def test_freed_neighbours_are_joined():
    parts = [result(4) for _ in range(4)]
    address = parts[1].data_ptr()
    for index in (1, 3, 2):
        parts[index] = None
    assert result(12).data_ptr() == address


def test_the_smallest_gap_that_is_large_enough_is_taken():
    parts = [result(size) for size in (8, 2, 4, 2, 6, 2)]
    address = parts[2].data_ptr()
    parts[0] = parts[2] = parts[4] = None
    assert result(4).data_ptr() == address


def test_tensors_in_use_never_share_memory():
    tensors = [result(2) for _ in range(5)]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * 4) for t in tensors)
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))


def test_small_results_are_left_to_malloc():
    small = result(0.5)
    assert _C.memory() == (0, 0) and (small == 2).all()


def test_what_is_held_is_bounded_by_what_was_in_use():
    """Images of ever other sizes must not pile up."""
    for megabytes in (8, 16, 4, 12, 24, 2, 20, 32, 28):
        result(megabytes)
    assert _C.memory() == (0, 32 * MB)


def test_empty_cache_gives_all_that_is_idle_back():
    held = result(8)
    result(16)
    fastres.empty_cache()
    assert _C.memory() == (8 * MB, 0)
    assert (held == 2).all()


def test_empty_cache_lowers_the_resident_memory():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("this system has no /proc")
    result(256)
    before = resident()
    fastres.empty_cache()
    assert before - resident() > 200 * MB


def test_from_malloc():
    with memory.from_malloc():
        inside = result(8)
        assert _C.memory() == (0, 0)
    after = result(8)
    assert _C.memory() == (8 * MB, 0)
    assert (inside == after).all()


def test_the_environment_variable_turns_it_off():
    code = (
        "import torch, fastres; x = torch.ones(1, 2**21); y = torch.ops.fastres.add_relu_forward(x, x); "
        "print(fastres._C.memory())"
    )
    for wish, expected in (("off", "(0, 0)"), ("on", f"({8 * MB}, 0)")):
        environment = {**os.environ, "FASTRES_KEEP_MEMORY": wish}
        out = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert out.stdout.strip() == expected


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_strides_are_those_of_empty_like(layout):
    input = torch.randn(4, 32, 64, 65).to(memory_format=layout)
    for view in (input, input[:1], input[:, :, :1].contiguous(memory_format=layout)):
        assert ops.add_relu(view, view).stride() == torch.empty_like(view).stride()
    assert _C.memory()[1] > 0


def test_views_keep_their_memory():
    view = result(8)[:, 5:10]
    assert _C.memory()[0] == 8 * MB
    other = result(8)
    assert (view == 2).all() and (other == 2).all()
    del view
    assert _C.memory() == (8 * MB, 8 * MB)


def test_tensors_are_freed_from_other_threads_at_the_same_time():
    def work() -> None:
        for size in (2, 3, 4) * 20:
            tensor = result(size)
            if not (tensor == 2).all():
                failed.append(size)

    failed: list[int] = []
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and _C.memory()[0] == 0


def test_results_are_saved_and_shared_like_any_tensor():
    tensor = result(2)
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    assert torch.equal(torch.load(file), tensor)
    assert torch.equal(tensor.clone().share_memory_(), tensor)
    assert torch.equal(tensor.share_memory_(), torch.full_like(tensor, 2)) and tensor.is_shared()
    assert tensor.numpy().base is not None


def test_a_child_of_fork_can_use_it():
    """As a DataLoader's worker is, with one thread: OpenMP has no others after fork."""
    code = (
        "import os, torch, fastres; torch.set_num_threads(1); x = torch.ones(1, 2**21)\n"
        "call = lambda: torch.ops.fastres.add_relu_forward(x, x)\n"
        "call(); child = os.fork()\n"
        "if not child: os._exit(0 if bool((call() == 2).all()) else 1)\n"
        "print(os.waitpid(child, 0)[1])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.stdout.strip() == "0"


def test_training_holds_no_more_after_many_steps_than_after_two():
    model = fastres.models.cifar_resnet20().to(memory_format=torch.channels_last)
    images = torch.randn(32, 3, 32, 32).to(memory_format=torch.channels_last)
    held = []
    for _ in range(10):
        model(images).sum().backward()
        model.zero_grad(set_to_none=True)
        held.append(sum(_C.memory()))
    assert held[1] > 8 * MB and len(set(held[1:])) == 1


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MB


@pytest.mark.parametrize("train", [True, False], ids=["train", "infer"])
def test_the_process_does_not_grow(train):
    """In 200 calls, of images whose size changes."""
    model = fastres.models.cifar_resnet20().to(memory_format=torch.channels_last)
    if not train:
        model = fastres.optimize_for_inference(model)
    inputs = [torch.randn(2, 3, side, side) for side in range(33, 53)]
    inputs = [input.to(memory_format=torch.channels_last) for input in inputs]

    def call(input):
        with torch.set_grad_enabled(train):
            output = model(input)
        if train:
            output.sum().backward()
            model.zero_grad(set_to_none=True)

    grown = []
    for _ in range(10):
        for input in inputs:
            call(input)
        gc.collect()
        grown.append((resident_mb(), len(gc.get_objects())))
    before, after = grown[4], grown[-1]
    assert after[0] - before[0] < 8 and after[1] - before[1] < 100, grown

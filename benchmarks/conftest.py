"""What the suites share: the device, `--device cpu|cuda`, and how to wait for it."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cpu", "cuda"], help="default: cuda where there is a device")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    asked = request.config.getoption("--device")
    torch.backends.cudnn.benchmark = True  # the best that stock PyTorch can do
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture
def timed(benchmark, device):
    """benchmark(call), where the device has done its work before a call counts as over."""

    def run(call):
        def call_and_wait():
            call()
            torch.cuda.synchronize()

        benchmark(call if device.type == "cpu" else call_and_wait)

    return run

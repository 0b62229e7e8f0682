"""A whole training step, fused and stock: `pytest benchmarks/test_step.py [--device cpu|cuda]`.

Forward, cross entropy, backward and SGD with momentum, channels_last. For numbers to report use
`fastres bench`, which runs the sides in turn.
"""

import argparse

import pytest

from fastres import bench, recording

BATCH = {"cpu": 16, "cuda": 128}


@pytest.mark.parametrize("name", ["fused", "eager"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_step(benchmark, timed, device, model, dtype, name):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    batch = BATCH[device.type]
    settings = f"--model {model} --dtype {dtype} --device {device.type} --batch {batch}"
    variant = bench.Variant(name, parser.parse_args(settings.split()))
    variant.warm_up()
    benchmark.group = f"training step {model} {dtype} batch {batch} {device.type}"
    benchmark.extra_info["images"] = batch
    with recording.record() as records:
        variant.step()
    assert {record.fused for record in records} == {name == "fused"}
    timed(variant.step)

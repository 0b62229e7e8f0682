"""A training step that is captured and replayed."""

import dataclasses

import pytest
import torch
from training import SETTINGS, RunAgain, weights

from fastres import cli
from fastres.cuda_graph import GraphedStep
from fastres.train import loop


def test_a_captured_step_is_replayed_on_each_whole_batch(few, tmp_path):
    settings = loop.Settings(**SETTINGS | dict(batch_size=20), cuda_graph=True)  # 20, 20 and 8 images
    plain, graphed = (loop.Run(settings, few, tmp_path / name) for name in ("plain", "graphed"))
    plain._step = plain._train_step
    graphs = RunAgain()
    graphed._step = GraphedStep(graphed._train_step, graphs)
    for run in (plain, graphed):
        torch.manual_seed(1)
        run.train()
    assert (graphs.aside, graphs.captured, graphs.replayed) == (3, 1, 3)
    assert torch.equal(weights(plain), weights(graphed))
    assert [epoch.loss for epoch in plain.epochs] == [epoch.loss for epoch in graphed.epochs]


def test_a_run_with_a_graph_continues_without(few, tmp_path):
    settings = loop.Settings(**SETTINGS, cuda_graph=True)
    graphed = loop.Run(settings, few, tmp_path)
    graphed._step = GraphedStep(graphed._train_step, RunAgain())
    graphed.train()
    plain = loop.Run(dataclasses.replace(settings, cuda_graph=False), few, tmp_path)
    plain.resume()
    assert torch.equal(weights(plain), weights(graphed))
    plain._train_epoch(0, None)
    assert all(isinstance(group["lr"], float) for group in plain.optimizer.param_groups)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_trains_with_a_cuda_graph(tmp_path, capsys):
    arguments = f"train --device cuda --cuda-graph --epochs 2 --out {tmp_path}/run"
    assert cli.main(arguments.split()) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("held-out accuracy ")

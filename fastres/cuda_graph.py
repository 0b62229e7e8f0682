"""A training step that is captured into a CUDA graph, and replayed: one launch instead of hundreds."""

from collections.abc import Callable

import torch
from torch import Tensor

# What a step computes from images and labels: loss and output.
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Results = tuple[Tensor, Tensor]


class CudaGraphs:
    """How a step on a device is run before it is captured, and captured. Reference: torch.cuda.graph."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None  # of all runs: each has a memory pool of its own

    def run_aside(self, run: Callable[[], Results]) -> Results:
        """On a stream of its own, as what is to be captured must have run there."""
        with torch.cuda.device(self._device):
            stream = self._stream = self._stream or torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results = run()
            torch.cuda.current_stream().wait_stream(stream)
        return results

    def capture(self, run: Callable[[], Results]) -> Callable[[], Results]:
        """Capture what `run` enqueues, and return what enqueues it again and gives the results."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph):
            results = run()

        def replay() -> Results:
            graph.replay()
            return results

        return replay


class GraphedStep:
    """Takes a few steps as they are, and the later ones as the graph that the next was captured into.

    All of them train. Batches of another shape than the first, as an epoch's last may be, are taken as they
    are at any time. The results of a step hold until the next.

    Args:
        step: computes with tensors that stay where they are, images and labels aside.
    """

    WARM_UP = 3  # steps, as many as torch.cuda.make_graphed_callables takes

    def __init__(self, step: Step, graphs: CudaGraphs) -> None:
        self._step, self._graphs = step, graphs
        self._shape: torch.Size | None = None
        self._taken = 0
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._replay: Callable[[], Results] | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> Results:
        if self._shape is None:
            self._shape = images.shape
        if images.shape != self._shape:
            return self._step(images, labels)
        if self._taken < self.WARM_UP:
            self._taken += 1
            return self._graphs.run_aside(lambda: self._step(images, labels))
        if self._replay is None:
            self._inputs = images.clone(), labels.clone()
            self._replay = self._graphs.capture(lambda: self._step(*self._inputs))
        for kept, given in zip(self._inputs, (images, labels), strict=True):
            kept.copy_(given)
        return self._replay()

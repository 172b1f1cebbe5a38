"""A step of training as a CUDA graph, so that launching kernels takes no time."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

WARM_UP = 3  # steps that are launched before one is recorded: they compile, and make the optimizer's state


class Step:
    """Calls ``run(batch) -> loss``; on a GPU it is recorded after a few calls, and replayed from then on.

    Args:
        run: A whole step, the optimizer's included, that starts without gradients and never waits for the GPU.
        device: Where it runs.
    """

    def __init__(self, run: Callable[[Any], Tensor], device: torch.device) -> None:
        self.run, self.is_graphed = run, device.type == "cuda"
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def is_warm(self) -> bool:
        """Whether the steps to come compile and record nothing."""
        return self.graph is not None if self.is_graphed else self.calls > 0

    def __call__(self, batch: Any) -> Tensor:
        """The loss; written over by the next call. ``batch``: tensors of the same sizes every time."""
        self.calls += 1
        if not self.is_graphed:
            return self.run(batch)
        if self.calls <= WARM_UP:
            return self._aside(batch)
        if self.graph is None and not self._recorded(batch):
            return self.run(batch)
        for own, given in zip(tree_leaves(self.batch), tree_leaves(batch), strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.loss

    def _aside(self, batch: Any) -> Tensor:
        """On a stream of its own, as what is recorded later has to be."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self.run(batch)
        torch.cuda.current_stream().wait_stream(stream)
        return loss

    def _recorded(self, batch: Any) -> bool:
        gc.collect()  # memory that is given back while a step is recorded would spoil it
        self.batch, graph = tree_map(torch.clone, batch), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.loss = self.run(self.batch)
        except RuntimeError as error:
            warnings.warn(f"A step can't be recorded and is launched kernel by kernel, slower: {error}", stacklevel=3)
            self.is_graphed = False
            return False
        self.graph = graph
        return True

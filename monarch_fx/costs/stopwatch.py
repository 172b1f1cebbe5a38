"""What single products take on a device of this machine, compiled: measured, where ``predict`` foretells it."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from monarch_fx.costs.predict import ALONE, Surroundings
from monarch_fx.costs.timing import WORKBENCHES, Run, multiplying_float32_in, seconds_of
from monarch_fx.errors import DeviceProfileError
from monarch_fx.kernels import choice
from monarch_fx.kernels.op import monarch_bmm
from monarch_fx.structure import MonarchShape

ROUNDS = 3  # of which the fastest counts: whatever else the machine does only adds to a time
MOST_COPIES = 64  # of the weights


class Stopwatch:
    """Times single products, compiled by ``torch.compile``; on a GPU in CUDA graphs.

    They have random activations and weights, of these as many copies in turn as a cache can't hold. A bias is added,
    and in inference exact GELU stands for the activation behind a product.

    Args:
        device: Of this machine.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self,
        tokens: int,
        in_features: int,
        out_features: int,
        shape: MonarchShape | None,
        *,
        batch: int = 1,
        dtype: str = "float32",
        workload: str = "inference",
        around: Surroundings = ALONE,
    ) -> float:
        """Seconds of one product, now: whatever else the machine does adds to them.

        Args:
            tokens, in_features, out_features: As of ``dense_seconds``.
            shape: The structure, None for dense.
            batch, dtype, workload, around: As of ``dense_seconds``.

        Raises:
            DeviceProfileError: The product can't be compiled, or run.
        """
        try:
            with _surroundings(self.device, dtype, workload == "training"):
                runs, products = self._runs(tokens, in_features, out_features, shape, batch, dtype, workload, around)
                runs[0]()  # compiles
                return min(seconds_of(runs, self.device) for _ in range(ROUNDS)) / products
        except RuntimeError as error:
            raise DeviceProfileError(
                f"The product {in_features} -> {out_features}, {shape or 'dense'}, at {tokens} tokens can't be timed "
                f'on {self.device}: {error}. Plan with times="predicted".'
            ) from error

    def _runs(
        self,
        tokens: int,
        in_features: int,
        out_features: int,
        shape: MonarchShape | None,
        batch: int,
        dtype: str,
        workload: str,
        around: Surroundings,
    ) -> tuple[list[Run], int]:
        """The products with one copy of the weights after the other, and how many there are in each run."""
        training, kind = workload == "training", torch.float32 if dtype == "tf32" else getattr(torch, dtype)
        together = 1 + len(around.joined) if tokens <= choice.FEW_TOKENS and not training else 1  # all of this size
        key = tokens, in_features, out_features, shape, batch, dtype, workload, around
        if key not in self._compiled:
            graph = _graph(shape, together, around, activated=around.activated and not training)
            self._compiled[key] = torch.compile(graph, dynamic=False)

        def random(*size: int) -> Tensor:
            return torch.randn((batch, *size) if batch > 1 else size, device=self.device, dtype=kind)

        x, sizes = random(tokens, in_features), _factor_sizes(in_features, out_features, shape)
        numbers = batch * together * sum(math.prod(size) for size in sizes)
        copies = WORKBENCHES[self.device.type].pool_bytes // (numbers * kind.itemsize)
        runs: list[Run] = []
        for _ in range(max(1, min(MOST_COPIES, copies))):
            factors = [random(*size) for _ in range(together) for size in sizes]
            bias = torch.randn(out_features, device=self.device, dtype=kind) if around.bias else None
            runs.append(functools.partial(_run, self._compiled[key], [x, *factors], bias, training))
        return runs, together


@contextlib.contextmanager
def _surroundings(device: torch.device, dtype: str, training: bool) -> Iterator[None]:
    on_gpu = device.type == "cuda"
    with contextlib.ExitStack() as stack:
        if on_gpu:
            stack.enter_context(torch.cuda.device(device))
        stack.enter_context(torch.random.fork_rng(devices=[device] if on_gpu else []))
        stack.enter_context(multiplying_float32_in("tf32" if dtype == "tf32" else "ieee"))
        stack.enter_context(torch.set_grad_enabled(training))
        yield


def _graph(shape: MonarchShape | None, together: int, around: Surroundings, activated: bool) -> fx.GraphModule:
    """Products of one x; a graph, since Dynamo counts recompilations by the code that it compiles."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    factors = [[graph.placeholder(f"{name}{i}") for name in ("RL" if shape else "W")] for i in range(together)]
    bias = graph.placeholder("bias") if around.bias else None
    results = []
    for operands in factors:
        if shape is None:
            y = graph.call_function(_dense, (x, *operands, bias))
        else:
            options: dict[str, Any] = {
                "out_features": shape.out_features if shape.padded else None,
                "recompute": around.recomputed,
            }
            y = graph.call_function(monarch_bmm, (x, *operands, bias), options)
        results.append(graph.call_function(F.gelu, (y,)) if activated else y)
    graph.output(tuple(results))
    return fx.GraphModule(torch.nn.Module(), graph)


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    y = torch.bmm(x, weight.mT)
    return y if bias is None else y + bias


def _factor_sizes(in_features: int, out_features: int, shape: MonarchShape | None) -> list[tuple[int, ...]]:
    if shape is None:
        return [(out_features, in_features)]
    n_out, n_in, rank = shape.nblocks_out, shape.nblocks_in, shape.rank
    return [(n_in, n_out, rank, shape.p), (n_out, n_in, rank, shape.s)]


def _run(product: Any, operands: list[Tensor], bias: Tensor | None, training: bool) -> object:
    """The products, in training with the gradients of x and of all factors; a bias has the same either way."""
    biases = [] if bias is None else [bias]
    if not training:
        return product(*operands, *biases)
    for operand in operands:
        operand.requires_grad_()
    (y,) = product(*operands, *biases)
    return torch.autograd.grad(y, operands, y.detach())

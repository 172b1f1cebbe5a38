"""A rewritten model and the dense one that it was made from, on the same inputs, product by product."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from monarch_fx.layers import MonarchWeight
from monarch_fx.layers.match import Match
from monarch_fx.passes import rewrite
from monarch_fx.passes.calibrate import observed
from monarch_fx.passes.inputs import Inputs
from monarch_fx.passes.modes import evaluated
from monarch_fx.passes.permute import reordered
from monarch_fx.records import Candidate, Plan

Compare = Callable[[Tensor, Tensor], Tensor]  # outputs of the dense product and of the rewritten one -> what that gives


class Pair:
    """The two models; both are run as they are, in the modes that they are in.

    Attributes:
        weights: The rewritten model's, by the parameter that they stand for.
        teacher: A copy of the dense model that shares its values, with hidden features in the order of the plan.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, plan: Plan) -> None:
        self.model = model
        self._jobs = {name: [d.candidate for d in made] for name, made in rewrite.by_parameter(plan).items()}
        self.weights = {name: cast(MonarchWeight, model.get_submodule(name)) for name in self._jobs}
        candidates = [candidate for mine in self._jobs.values() for candidate in mine]
        twin = observed(reordered(teacher, plan.orders), candidates, self._hear)
        self.teacher = evaluated(twin).requires_grad_(False)
        self._heard: dict[Any, list[tuple[torch.Size, Tensor]]] | None = None

    def run(self, inputs: Inputs, compare: Compare) -> None:
        """Runs both, the dense one without gradients, and tells ``compare`` of every product of the rewritten weights,
        those of their pieces that stayed dense too, in the order in which they are computed. Experts are left out: the
        two models may send them other tokens.

        Raises:
            ExampleInputsError: A model can't run on the inputs.
        """
        self._heard = defaultdict(list)
        for name, mine in self._jobs.items():
            self.weights[name].observer = functools.partial(self._compare, mine, compare)
        try:
            with torch.no_grad():
                inputs.into(self.teacher)
            inputs.into(self.model)
        finally:
            self._heard = None
            for weight in self.weights.values():
                weight.observer = None

    def _hear(self, candidates: Sequence[Candidate], match: Match, x: Tensor, y: Tensor) -> Tensor:
        if self._heard is not None:
            self._heard[candidates[match.piece].name, str(match)].append((x.shape, y))
        return y

    def _compare(self, candidates: Sequence[Candidate], compare: Compare, match: Match, x: Tensor, y: Tensor) -> Tensor:
        assert self._heard is not None
        candidate = candidates[match.piece]
        heard = self._heard[candidate.name, str(match)]
        shape, wanted = heard.pop(0) if heard else (None, y)
        if shape != x.shape or match.flipped or candidate.batch > 1:
            return y.detach()
        return compare(wanted, y)

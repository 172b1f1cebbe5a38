"""What passes between the steps: frozen, printable, saved as JSON; no fx.Node and no tensor inside."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from monarch_fx.errors import ConfigError, PlanMismatchError, StructureError
from monarch_fx.structure import MonarchShape
from monarch_fx.views import MatrixView

PLAN_VERSION = 4


@dataclass(frozen=True)
class Call:
    """One execution of a product in a run of the model.

    Attributes:
        tokens: Rows of the activation, as a sympy expression of the model's input sizes, in text.
        count: ``tokens`` at the sizes of the captured inputs, or 0 where no inputs were captured.
        share: ``count`` over the model's main token count: what ``tokens=T`` is multiplied with.
    """

    tokens: str
    count: int
    share: float = 1.0


@dataclass(frozen=True)
class Candidate:
    """A static matrix (or a batch of equal ones) that products of the model read, and that may be rewritten.

    Attributes:
        name: The parameter's qualified name and its view: ``blocks.0.attn.in_proj_weight[0:768]``.
        parameter: The parameter's qualified name.
        parameter_shape: Its shape.
        view: Which of its entries, and which of their dimensions are outputs and inputs.
        kind: The product's form: linear, conv1d, matmul, einsum, ...
        calls: Its executions in one run; they share the factors.
        dtype: Of the weight, without ``torch.``.
        bias: The products add a bias.
        activated: Their results go into an activation that the operator can compute, and nowhere else.
        activation: A number for what is read, the same in all products that read the same.
        beside: ``out_features`` of the other ones that do, in the order of their calls.
        own_bias: A bias that only these products add: its parameter, and the place among its entries of that of the
            first output.
    """

    name: str
    parameter: str
    parameter_shape: tuple[int, ...]
    view: MatrixView
    kind: str
    calls: tuple[Call, ...]
    dtype: str
    bias: bool = False
    activated: bool = False
    activation: int | None = None
    beside: tuple[int, ...] = ()
    own_bias: tuple[str, int] | None = None

    @property
    def in_features(self) -> int:
        return self.view.in_features

    @property
    def out_features(self) -> int:
        return self.view.out_features

    @property
    def batch(self) -> int:
        """Equal matrices that one product multiplies with (experts of a mixture); 1 for a plain product."""
        return self.view.batch_size

    @property
    def params(self) -> int:
        return self.view.numel

    def token_counts(self, tokens: int) -> tuple[int, ...]:
        """Rows per call when the model's main token count is ``tokens``."""
        return tuple(max(1, round(call.share * tokens)) for call in self.calls)


@dataclass(frozen=True)
class Declined:
    """A product that is left as it is, and why. ``params`` is 0 where no single weight can be named."""

    name: str
    kind: str
    in_features: int
    out_features: int
    params: int
    calls: int
    reason: str


@dataclass(frozen=True)
class Decision:
    """What is done with one candidate.

    Attributes:
        shape: The structure of each of its matrices, or None where it stays dense.
        reason: Why dense, or why this structure.
        error: Estimated ``||W - M||_F / ||W||_F``, in the norm that the plan's ``error_source`` names; 0 where it stays
            dense.
        dense_s: Seconds of all its calls in one run, dense: predicted or measured, as the plan's ``times`` say.
        time_s: The same as decided.
        pays: At how many rows a call the structure is predicted faster than dense, as ranges of the first and the last
            (None: without end): those that the plan is made for lie in, and the one without end.
        loss: Second-order increase of the model's loss that this decision costs by itself, a token; None where no
            calibration data tell.
    """

    candidate: Candidate
    shape: MonarchShape | None
    reason: str
    error: float
    dense_s: float
    time_s: float
    pays: tuple[tuple[int, int | None], ...]
    loss: float | None = None

    @property
    def params(self) -> int:
        return self.candidate.params if self.shape is None else self.candidate.batch * self.shape.params


@dataclass(frozen=True)
class HiddenOrder:
    """Hidden features that are put in another order, which changes the blocks of grids and nothing else.

    Layers that were reordered hold their features in this order also after ``to_dense``. Checkpoints of whole models go
    on being right; single weights and biases of the original model don't fit beside reordered ones.

    Attributes:
        along: Parameters, and the dimension of each along which the features run.
        order: Of the features: the first one is that which had the index ``order[0]`` in the original model.
    """

    along: tuple[tuple[str, int], ...]
    order: tuple[int, ...]

    @property
    def inverse(self) -> HiddenOrder:
        """What puts them back."""
        return HiddenOrder(self.along, tuple(sorted(range(len(self.order)), key=self.order.__getitem__)))


@dataclass(frozen=True)
class Plan:
    """What is done with every product of a model, and what was predicted; print it, save it, edit it, replay it.

    Attributes:
        budget: The share of the eligible products' parameters that was asked for, or of their dense time where
            ``objective`` is ``"latency"``; None: the structure was forced.
        tokens: Main token counts that the plan is made for, with their weights.
        tokens_source: Where they come from, in words.
        workload: ``"inference"`` (forward) or ``"training"`` (forward and backward).
        dtype: Of the planned run.
        device: Name of the device profile.
        error_source: How the errors were estimated, in words.
        model_params: Parameters of the whole model, tied ones counted once.
        fingerprint: Hash of names, shapes and ties of the model that the plan is for.
        capture: How the graph was captured, in words.
        orders: Hidden features that are put in another order, before anything is projected.
        times: ``"predicted"`` or ``"measured"``: where the seconds of its decisions come from.
    """

    decisions: tuple[Decision, ...]
    declined: tuple[Declined, ...]
    budget: float | None
    tokens: tuple[tuple[int, float], ...]
    tokens_source: str
    workload: str
    dtype: str
    device: str
    error_source: str
    model_params: int
    fingerprint: str
    capture: str
    notes: tuple[str, ...] = field(default=())
    objective: str = "params"
    orders: tuple[HiddenOrder, ...] = ()
    times: str = "predicted"

    @property
    def rewritten(self) -> tuple[Decision, ...]:
        return tuple(d for d in self.decisions if d.shape is not None)

    @property
    def eligible_params(self) -> int:
        return sum(d.candidate.params for d in self.decisions)

    @property
    def kept_params(self) -> int:
        """Parameters of the eligible products after rewriting, padding included."""
        return sum(d.params for d in self.decisions)

    @property
    def kept_time(self) -> float:
        """Seconds of the eligible products over their dense ones."""
        return sum(d.time_s for d in self.decisions) / sum(d.dense_s for d in self.decisions)

    @property
    def reached(self) -> float:
        """The budget that the plan reaches: kept over eligible parameters, or over dense time."""
        return self.kept_time if self.objective == "latency" else self.kept_params / self.eligible_params

    @property
    def rewritten_share(self) -> float:
        """Share of the eligible parameters that sits in rewritten products."""
        return sum(d.candidate.params for d in self.rewritten) / self.eligible_params

    @property
    def monarch_calls(self) -> int:
        """``monarch_bmm`` nodes that one run executes."""
        return sum(len(d.candidate.calls) for d in self.rewritten)

    @property
    def loss(self) -> float | None:
        """Predicted increase of the model's loss: the sum of those of its products; None where none is known."""
        return _sum([d.loss for d in self.decisions])

    def __getitem__(self, name: str) -> Decision:
        for decision in self.decisions:
            if decision.candidate.name == name:
                return decision
        known = ", ".join(d.candidate.name for d in self.decisions[:5]) + (", ..." if len(self.decisions) > 5 else "")
        raise KeyError(f"The plan has no product {name!r}. Its products: {known}")

    def with_shape(self, name: str, *, nblocks_out: int = 1, nblocks_in: int = 1, rank: int | None = None) -> Plan:
        """A copy in which product ``name`` has another structure, or stays dense where nothing else is given.

        The error, the loss and the times of an edited product are not predicted again: they are NaN.

        Raises:
            KeyError: The plan has no such product.
            ConfigError: A grid has no rank.
            StructureError: The matrix has no room for the grid, or its blocks for the rank.
        """
        old = self[name]
        shape = None
        if rank is not None:
            size = old.candidate.in_features, old.candidate.out_features
            shape = MonarchShape(*size, nblocks_out=nblocks_out, nblocks_in=nblocks_in, rank=rank)
            if rank > shape.full_rank:
                raise StructureError(
                    f"{name!r} has blocks of {shape.s} x {shape.p} in a grid of {nblocks_out}x{nblocks_in}, which are "
                    f"exact at rank {shape.full_rank}, got rank={rank}: give at most that."
                )
        elif (nblocks_out, nblocks_in) != (1, 1):
            raise ConfigError(f"A grid of {nblocks_out}x{nblocks_in} blocks for {name!r} needs a rank.")
        nan = float("nan")
        new = dataclasses.replace(
            old,
            shape=shape,
            reason="edited",
            error=0.0 if shape is None else nan,
            time_s=old.dense_s if shape is None else nan,
            pays=(),
            loss=None if old.loss is None else 0.0 if shape is None else nan,
        )
        decisions = tuple(new if d is old else d for d in self.decisions)
        return dataclasses.replace(self, decisions=decisions)

    def to_json(self) -> str:
        """The plan as JSON text; ``Plan.from_json`` reads it back unchanged."""
        orders = [{"along": o.along, "order": " ".join(map(str, o.order))} for o in self.orders]  # one line each
        return json.dumps({"version": PLAN_VERSION, **dataclasses.asdict(self), "orders": orders}, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Reads what ``to_json`` wrote.

        Raises:
            PlanMismatchError: The text is not a plan, or one of another version.
        """
        try:
            data = json.loads(text)
            version = data.pop("version")
            if version != PLAN_VERSION:
                raise PlanMismatchError(
                    f"The plan has version {version!r}, this library reads version {PLAN_VERSION}: make it again."
                )
            return _plan(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, PlanMismatchError):
                raise
            raise PlanMismatchError(f"This text is not a plan as Plan.to_json() writes it: {error!r}.") from error

    def __str__(self) -> str:
        from monarch_fx.reporting.tables import plan_table  # printing only: records import no table library

        return plan_table(self)


def _sum(losses: Sequence[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return sum(known) if known else None


def _plan(data: dict[str, Any]) -> Plan:
    decisions = []
    for item in data.pop("decisions"):
        candidate = item.pop("candidate")
        view = candidate.pop("view")
        batch, out, inp = (tuple(map(tuple, view[name])) for name in ("batch", "out", "inp"))
        calls = tuple(Call(**call) for call in candidate.pop("calls"))
        shape = item.pop("shape")
        item["pays"] = tuple(map(tuple, item["pays"]))
        own_bias = candidate.pop("own_bias")
        made = Candidate(
            **{**candidate, **{name: tuple(candidate[name]) for name in ("parameter_shape", "beside")}},
            own_bias=None if own_bias is None else (own_bias[0], int(own_bias[1])),
            view=MatrixView(batch, out, inp, view["offset"]),
            calls=calls,
        )
        decisions.append(Decision(candidate=made, shape=None if shape is None else MonarchShape(**shape), **item))
    declined = tuple(Declined(**item) for item in data.pop("declined"))
    tokens = tuple((int(count), float(weight)) for count, weight in data.pop("tokens"))
    notes = tuple(data.pop("notes"))
    orders = tuple(
        HiddenOrder(tuple((name, d) for name, d in item["along"]), tuple(map(int, item["order"].split())))
        for item in data.pop("orders", ())
    )
    return Plan(tuple(decisions), declined, tokens=tokens, notes=notes, orders=orders, **data)


@dataclass(frozen=True)
class Recovery:
    """What distillation did to a rewritten model.

    Attributes:
        before: Distance of its outputs from the teacher's, mean over held-out batches: the divergence of logits a
            token, or half the relative squared error of the output.
        after: The same at the end.
        steps: Of one batch each.
        seconds: Wall-clock time.
    """

    before: float
    after: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """What was done to a model; print it, or take ``to_dict()``.

    Attributes:
        plan: The plan that was carried out.
        errors: ``||W - M||_F / ||W||_F`` of every rewritten product, from its factors; NaN for ``init="random"``; where
            ``calibrated`` ``||(W - M) x|| / ||W x||`` on the calibration inputs, with what a corrected bias mends.
        init: ``"project"`` or ``"random"``.
        params_before: Parameters of the whole model, tied ones counted once.
        params_after: The same after rewriting.
        seconds: Wall-clock time of projection and rewriting.
        versions: Of the libraries involved.
        losses: Second-order increase of the model's loss by every rewritten product that calibration data tell of, from
            its factors.
        recovery: What ``recover`` did afterwards; errors and losses are those before it.
        measured_loss: What ``measure_loss`` found.
    """

    plan: Plan
    errors: tuple[tuple[str, float], ...]
    init: str
    params_before: int
    params_after: int
    seconds: float
    versions: tuple[tuple[str, str], ...]
    calibrated: bool = False
    losses: tuple[tuple[str, float], ...] = ()
    recovery: Recovery | None = None
    measured_loss: float | None = None

    @property
    def loss(self) -> float | None:
        """Increase of the model's loss that the factors as made predict to second order; None where it is not known."""
        return _sum([loss for _, loss in self.losses])

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as JSON takes them."""
        data = dataclasses.asdict(self)
        return {**data, "errors": dict(self.errors), "losses": dict(self.losses), "versions": dict(self.versions)}

    def __str__(self) -> str:
        from monarch_fx.reporting.tables import report_table  # printing only

        return report_table(self)


@dataclass(frozen=True)
class TrainingSummary:
    """What a training step costs in the eligible products, dense and as rewritten; print it.

    Attributes:
        params_before: Parameters of the whole model, tied ones counted once.
        params_after: The same after rewriting.
        dense_flops: Multiplications and additions of a step, forward and backward, with dense weights.
        flops: The same as rewritten.
        dense_s: Predicted seconds of a step with dense weights.
        time_s: The same as rewritten.
        dense_kept_bytes: Bytes of activations that the backward pass needs of the products, with dense weights: their
            inputs, once for all products that read the same ones.
        kept_bytes: The same as rewritten, with the intermediates that are not recomputed.
        tokens: Main token counts of a step, with their weights; sums above are weighted means.
        dtype: Of the run.
        device: Name of the device profile.
    """

    params_before: int
    params_after: int
    dense_flops: float
    flops: float
    dense_s: float
    time_s: float
    dense_kept_bytes: float
    kept_bytes: float
    tokens: tuple[tuple[int, float], ...]
    dtype: str
    device: str

    def __str__(self) -> str:
        from monarch_fx.reporting.tables import training_table  # printing only

        return training_table(self)

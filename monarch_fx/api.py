"""The seven steps in order: capture, candidates, costs, plan, project, rewrite, report."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn
from tqdm.auto import tqdm

from monarch_fx import assess
from monarch_fx.config import MonarchConfig
from monarch_fx.costs import DeviceProfile, Stopwatch, device_of, resolve
from monarch_fx.errors import ConfigError, MetaDeviceError
from monarch_fx.factors import FactorMaker, work_folder
from monarch_fx.layers import MonarchWeight
from monarch_fx.passes import checks, graph, rewrite
from monarch_fx.passes.calibrate import Calibration, calibrated
from monarch_fx.passes.candidates import find_candidates
from monarch_fx.passes.capture import capture
from monarch_fx.passes.inputs import Inputs, in_memory, inputs_of, with_first_batch
from monarch_fx.passes.permute import felt, find_hidden, reorder, reordered, reordered_statistics
from monarch_fx.passes.select import Patterns, select
from monarch_fx.planning import check_choices, decide
from monarch_fx.planning.workload import Tokens, planned_dtype, token_mix
from monarch_fx.records import Candidate, HiddenOrder, Plan, Report
from monarch_fx.rewritten import note, report


# In inference mode nothing could be differentiated, and factors could never be trained.
@torch.inference_mode(False)
def plan(
    model: nn.Module | torch.export.ExportedProgram,
    budget: float | None = None,
    *,
    example_inputs: Any = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    tokens: Tokens = None,
    workload: str = "inference",
    objective: str = "params",
    device: str | DeviceProfile = "auto",
    dtype: torch.dtype | str | None = None,
    config: MonarchConfig | None = None,
    calibration: Calibration | Iterable[Any] | None = None,
    times: str = "predicted",
    strict: bool = False,
) -> Plan:
    """Decides what ``monarchify`` would do, and changes nothing.

    Args:
        model: Any ``nn.Module`` (a ``GraphModule`` too), or an ``ExportedProgram``. On the meta device the errors come
            from a prior by shape, since there are no values; of grids that it can't tell apart (10 % of the squared
            error, about as many parameters) the fastest is taken.
        budget: Share of the eligible products' parameters that may be kept, in (0, 1], or of their dense time. May be
            left out where ``config`` forces a grid.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments of ``forward``. Without them
            the model's own dummy inputs give the graph, where it has any, else the first batch of ``calibration``.
        include: Which products may be rewritten: a glob on the name of a weight or its layer, a compiled regex, a
            callable ``(name, owner) -> bool``, or a list of these. Default: all but output heads and embeddings.
        exclude: Which products stay dense; wins over ``include``.
        tokens: Rows of the activations that are planned for: a number, or ``{tokens: weight}``. Products with other row
            counts are scaled alike. Default: what ``example_inputs`` give, else 4096.
        workload: ``"inference"`` (forward) or ``"training"`` (forward and backward).
        objective: What ``budget`` limits while the error is made smallest: ``"params"``, or ``"latency"``, the
            time of the eligible products, as ``times`` gives it.
        device: Profile that the cost model plans for: ``"auto"`` (where the model is), ``"cpu"``, ``"h100"``, ... or a
            ``DeviceProfile``.
        dtype: Of the run that is planned for (``torch.bfloat16`` or its name), where it is not that of the weights, as
            under autocast. ``"tf32"``: float32 in TF32, which float32 on a GPU means where PyTorch is set to it
            (``torch.set_float32_matmul_precision("high")``).
        config: Further choices; see ``MonarchConfig``.
        calibration: Batches of real inputs (a list, a ``DataLoader``), each in one of the forms of ``example_inputs``,
            or what ``calibrate`` made of them. The dense model runs on them once, forward and backward, and errors are
            those that its loss feels there to second order, not those of the weights.
        times: ``"predicted"`` by the cost model, or ``"measured"``: the dense products, and the structures that the
            plan comes to choose, are compiled and timed on this machine, some seconds each. Then nothing is rewritten
            that isn't really faster than dense, by itself, as ``torch.compile`` makes it.
        strict: Raise where the budget can't be reached.

    Returns:
        The plan: printable, ``to_json()``, editable, and replayed by ``monarchify(model, plan=plan)``.

    Raises:
        ConfigError: ``budget``, ``tokens``, ``workload``, ``dtype`` or ``calibration`` has no meaning.
        NotAModuleError, WrappedModelError: ``model`` is no plain module.
        ExampleInputsError, CaptureError: The model can't be captured on the inputs.
        SelectionError, NoEligibleProductError: ``include``, ``exclude`` or the model leave nothing to do.
        WeightError: A weight is NaN, infinite, quantised, sparse, integer or complex.
        BudgetError: ``strict=True``, and the budget can't be reached, or no product has room for the grid of
            ``config``; else that is a ``BudgetWarning``.
        DeviceProfileError: No profile fits; or times are to be measured, and ``device`` is none of this machine.
    """
    options = {"example_inputs": example_inputs, "include": include, "exclude": exclude, "tokens": tokens}
    options |= {"workload": workload, "objective": objective, "device": device, "dtype": dtype}
    options |= {"config": config, "calibration": calibration, "times": times, "strict": strict}
    return _make_plan(model, budget, **options)[0]


@torch.inference_mode(False)
def monarchify(
    model: Any,
    budget: float | None = None,
    *,
    plan: Plan | None = None,
    example_inputs: Any = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    tokens: Tokens = None,
    workload: str = "inference",
    objective: str = "params",
    inplace: bool = False,
    init: str = "project",
    device: str | DeviceProfile = "auto",
    dtype: torch.dtype | str | None = None,
    config: MonarchConfig | None = None,
    calibration: Calibration | Iterable[Any] | None = None,
    anchor: Iterable[Any] | None = None,
    times: str = "predicted",
    strict: bool = False,
    work_dir: str | os.PathLike[str] | None = None,
) -> Any:
    """Replaces the matrix products of ``model`` that pay by Monarch products.

    Every argument that ``plan`` has too means the same here.

    Args:
        model: Any ``nn.Module``; a ``GraphModule`` gets ``monarch_bmm`` nodes in its graph; an ``ExportedProgram`` is
            exported again.
        budget: Share of the eligible products' parameters that may be kept, in (0, 1], or of their dense time.
        plan: A plan to replay, also one made for another copy of the same architecture; no other choice may be given.
        inplace: Rewrite the argument itself, one parameter after the other, freeing each dense weight as it goes; for
            models too big for two. After a failure it is a valid model, and ``report`` says what was done.
        init: ``"project"`` (closed-form projection of the weights; Dao et al. 2022, section 3.3) or ``"random"`` (the
            same structure with random factors whose product has the weight's own mean square).
        calibration: As for ``plan``; with a plan, too. The projection then keeps what the model's loss feels of the
            products' outputs on these inputs, and not the entries of the weights: least squares in the norms of
            E[x x^T] and E[g g^T], with g the loss gradients at the outputs.
        anchor: Batches like those of ``calibration``, or the same. The products are then projected in the order in
            which the model runs them, each for the inputs that the compressed ones before feed it, and so that its
            outputs come near to those of the dense model: errors made before are mended. A bias that only one product
            adds gives the mean of its outputs back. The batches are all in memory at once, with what the model has
            computed of them so far.
        work_dir: A folder in which the factors of each product are kept as soon as they are projected. Called again
            after an interruption, projecting goes on where it was; factors of other weights, structures or calibration
            data are known by a hash, and made anew.

    Returns:
        A rewritten model of the same class, independent of the argument; the argument itself with ``inplace=True``.

    Raises:
        PlanMismatchError: ``plan`` is for another architecture.
        MetaDeviceError: The model has no values to project; such a model can only be planned.
        As ``plan`` does, always before anything is changed.
    """
    if init not in ("project", "random"):
        raise ConfigError(f'init must be "project" or "random", got {init!r}.')
    if init == "random" and not (calibration is None and anchor is None):
        raise ConfigError('calibration and anchor are for init="project": random factors keep nothing of the weights.')
    if not (calibration is None and anchor is None):
        checks.check_runs(model)
    choices: dict[str, Any] = {"budget": budget, "include": include, "exclude": exclude, "tokens": tokens}
    choices |= {"workload": workload, "objective": objective, "device": device, "dtype": dtype}
    choices |= {"config": config, "times": times, "strict": strict}
    if isinstance(model, torch.export.ExportedProgram):
        others: dict[str, Any] = {"plan": plan, "example_inputs": example_inputs, "init": init, "work_dir": work_dir}
        rewritten = monarchify(graph.program_module(model), inplace=True, **choices, **others)
        exported = graph.export_again(model, rewritten)
        note(exported, report(rewritten))
        return exported
    model = checks.check_model(model)
    if checks.on_meta(model):
        raise MetaDeviceError(
            f"{type(model).__name__} is on the meta device: it can be planned (monarch_fx.plan), and rewritten once it "
            "is loaded."
        )
    if anchor is not None:
        given, anchor = anchor, in_memory(model, anchor, "anchor")
        calibration = anchor if calibration is given else calibration  # an iterator can be read only once
    example_inputs, calibration = with_first_batch(model, example_inputs, calibration, "calibration")
    example_inputs, anchor = with_first_batch(model, example_inputs, anchor, "anchor")
    folder = None if work_dir is None else work_folder(work_dir)

    if plan is None:
        plan, known = _make_plan(model, example_inputs=example_inputs, calibration=calibration, **choices)
    else:
        defaults = inspect.signature(monarchify).parameters
        chosen = [name for name, value in choices.items() if value != defaults[name].default]
        if chosen:
            raise ConfigError(
                f"A plan already says everything: don't give {', '.join(chosen)} as well, or edit the plan."
            )
        checks.check_plan(model, plan)
        products = [d.candidate for d in plan.rewritten]
        checks.check_weights(model, products, values=True)
        known = None if calibration is None else calibrated(model, products, calibration)
    known = _reordered(known, [d.candidate for d in plan.rewritten], plan.orders)
    maker = FactorMaker(init, {} if known is None else known.statistics, folder)
    inputs = None if example_inputs is None else inputs_of(model, example_inputs)
    return _carry_out(model, plan, maker, anchor, inplace, inputs)


@torch.inference_mode(False)
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    example_inputs: Any = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
) -> Calibration:
    """Runs the dense model on calibration data once, for any number of plans: ``calibration=calibrate(...)``.

    Args:
        model: Any ``nn.Module`` with values; it is left as it was.
        batches: Real inputs, as for ``plan(calibration=...)``.
        example_inputs, include, exclude: As for ``plan``; products that are not included here are projected plainly.

    Returns:
        Second moments of what every product sees and of the loss gradients at what it gives; (in, in) and (out, out)
        float64 numbers a product, 183 GiB for a Llama-8B shape. Where they don't fit on a GPU together, the model runs
        several times, for some of the products each, and they are on the CPU.

    Raises:
        MetaDeviceError: The model has no values.
        As ``plan`` does.
    """
    checks.check_runs(model)
    example_inputs, batches = with_first_batch(model, example_inputs, batches, "calibration")
    captured = capture(model, inputs_of(model, example_inputs))
    candidates, _ = select(*find_candidates(captured, model), model, include, exclude)
    checks.check_weights(model, candidates, values=True)
    return calibrated(model, candidates, batches)


def _make_plan(
    model: Any,
    budget: float | None,
    *,
    example_inputs: Any,
    include: Patterns | None,
    exclude: Patterns | None,
    tokens: Tokens,
    workload: str,
    objective: str,
    device: str | DeviceProfile,
    dtype: torch.dtype | str | None,
    config: MonarchConfig | None,
    calibration: Calibration | Iterable[Any] | None,
    times: str,
    strict: bool,
) -> tuple[Plan, Calibration | None]:
    """The plan, and what calibration data say."""
    if calibration is not None:
        checks.check_runs(model)
    if isinstance(model, torch.export.ExportedProgram):
        model = graph.program_module(model)
    model = checks.check_model(model)
    config = config or MonarchConfig()
    check_choices(budget, workload, objective, config, times)
    has_values = not checks.on_meta(model)
    example_inputs, calibration = with_first_batch(model, example_inputs, calibration, "calibration")

    captured = capture(model, inputs_of(model, example_inputs))
    candidates, declined = select(*find_candidates(captured, model), model, include, exclude)
    checks.check_weights(model, candidates, values=has_values)

    torch_device = next(model.parameters()).device
    profile = resolve(device, torch_device)
    stopwatch = Stopwatch(device_of(profile, torch_device)) if times == "measured" else None
    mix, tokens_source = token_mix(tokens, candidates, captured.given)
    run_dtype = planned_dtype(dtype, candidates, profile)

    known = None if calibration is None else calibrated(model, candidates, calibration)
    orders: tuple[HiddenOrder, ...] = ()
    if known is not None and config.reorder and not config.low_rank_only:
        orders = assess.orders(model, find_hidden(captured, model), candidates, known)
    planned, seen = reordered(model, orders), _reordered(known, candidates, orders)
    errors, error_source, doubt = assess.errors(planned, candidates, config, seen)
    decisions = decide(
        candidates,
        errors,
        doubt=doubt,
        losses=assess.losses(planned, candidates, seen),
        measure=assess.measures(planned, candidates, seen),
        stopwatch=stopwatch,
        budget=budget,
        objective=objective,
        config=config,
        profile=profile,
        tokens=mix,
        workload=workload,
        dtype=run_dtype,
        strict=strict,
    )
    made = Plan(
        decisions=decisions,
        declined=tuple(declined),
        budget=budget,
        tokens=tuple(mix.items()),
        tokens_source=tokens_source,
        workload=workload,
        dtype=run_dtype,
        device=profile.name,
        error_source=error_source,
        model_params=checks.total_params(model.parameters()),
        fingerprint=checks.fingerprint(model),
        capture=captured.how,
        objective=objective,
        orders=felt(orders, decisions),
        times=times,
    )
    return made, known


def _carry_out(
    model: nn.Module, plan: Plan, maker: FactorMaker, anchor: Iterable[Any] | None, inplace: bool, inputs: Inputs | None
) -> nn.Module:
    """The last three steps: projects every weight that the plan rewrites, installs the factors, and reports."""
    start = time.perf_counter()
    before = checks.total_params(model.parameters())
    if inplace:
        reorder(model, plan.orders)
    else:
        model = reordered(model, plan.orders)
    if anchor is not None:
        try:
            maker.make_in_order(model, plan, anchor)
        except BaseException:
            if inplace:
                reorder(model, [order.inverse for order in plan.orders])
            raise
    jobs = rewrite.by_parameter(plan)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights: dict[str, MonarchWeight] = {}

    def install(target: nn.Module, name: str, weight: MonarchWeight) -> None:
        rewrite.install(target, name, weight)
        for product in [d.candidate for d in jobs[name]]:
            if product.name in maker.shifts:
                rewrite.shift_bias(target, product, maker.shifts[product.name])

    def finish(target: nn.Module) -> None:
        after = checks.total_params(target.parameters())
        seconds = time.perf_counter() - start
        versions = (("torch", torch.__version__),)
        figures = tuple(maker.errors.items()), maker.init, before, after, seconds, versions
        note(target, Report(plan, *figures, calibrated=bool(maker.statistics), losses=tuple(maker.losses.items())))

    try:
        for name, decisions in tqdm(jobs.items(), desc="project", unit="weight", leave=False):
            weight = rewrite.build_weight(parameters[name], decisions, maker.make)
            if inplace:
                install(model, name, weight)
                del parameters[name]
            else:
                weights[name] = weight
    finally:
        if inplace:
            finish(model)
    if inplace:
        target = model
    else:
        target = rewrite.copy_without(model, weights)
        for name, weight in weights.items():
            install(target, name, weight)
    if isinstance(target, fx.GraphModule):
        graph.expose(target, inputs)
    finish(target)
    return target


def _reordered(
    known: Calibration | None, candidates: Sequence[Candidate], orders: Sequence[HiddenOrder]
) -> Calibration | None:
    """What the products see once hidden features are in these orders."""
    return known and reordered_statistics(known, {c.name: c.view for c in candidates}, orders)

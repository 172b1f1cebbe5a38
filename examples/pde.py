"""Neural operators for Burgers and Navier-Stokes, with Fourier transforms that are fixed, and that are learned.

The Fourier neural operator (Li et al. 2021) multiplies low frequencies by learned matrices. The Monarch neural operator
is the same, but its transforms are Monarch matrices that start as the Fourier transform and its inverse (Dao et al.
2022, section 5.1). Both start with the same values, and so with the same outputs. Data come from our own solver
(``examples/solver.py``). As in FNO's paper the initial state of Burgers' equation is mapped to the state at time 1, and
a flow is foretold one time after the other, each from the times before it, trained through the whole of them.

    python -m examples.pde --out results/pde
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.curves import Curve, print_table, save_curves, spread, write_json
from examples.solver import TAU, burgers, navier_stokes, random_fields
from examples.training import Figures, Settings, arguments, device, picks, seeds, train
from monarch_fx.transforms import LearnedTransform, dft, dft2, idft, idft2

PAPER = (  # Dao et al. 2022, table 3: relative error on Navier-Stokes, 64 x 64, for three viscosities
    "the authors, Navier-Stokes with viscosity 1e-3 / 1e-4 / 1e-5 up to time 50 / 30 / 20: "
    "FNO 0.017 / 0.178 / 0.155, Monarch-NO 0.010 / 0.145 / 0.136"
)
ERROR = "relative error"
FNO, MONARCH = "FNO", "Monarch-NO"
# Learning rate of a learned transform, times that of the rest: of 1, 0.1 and 0.02 the best by small runs' test errors
TRANSFORM_LR = 0.02


@dataclass(frozen=True)
class Problem:
    """One equation at one size.

    Attributes:
        seen: How many states after each other are given, a unit of time apart.
        ahead: How many are foretold.
        solver_steps: In a unit of time.
        lr: Peak learning rate.
    """

    name: str
    shape: tuple[int, ...]
    viscosity: float
    seen: int
    ahead: int
    solver_steps: int
    training: int
    testing: int
    width: int
    modes: int
    batch: int
    steps: int
    lr: float

    def after(self, states: Tensor) -> Tensor:
        """A unit of time later."""
        if len(self.shape) == 1:
            return burgers(states, self.viscosity, 1.0, self.solver_steps)
        x = torch.arange(self.shape[0], device=states.device) / self.shape[0]
        phase = TAU * (x.unsqueeze(-1) + x)
        force = 0.1 * (torch.sin(phase) + torch.cos(phase))
        return navier_stokes(states, self.viscosity, 1.0, self.solver_steps, force)

    def data(self, seed: int, at: torch.device) -> Tensor:
        """States at times 0, 1, ..., (examples, seen + ahead, *shape); distributions are those of FNO's code."""
        scale, tau, alpha = (25.0, 5.0, 2.0) if len(self.shape) == 1 else (7**1.5, 7.0, 2.5)
        count = self.training + self.testing
        states = [random_fields(count, self.shape, scale, tau, alpha, seed).to(at)]
        while len(states) < self.seen + self.ahead:
            states.append(self.after(states[-1]))
        return torch.stack(states, 1)


SMALL = (
    Problem("Burgers", (64,), 0.01, 1, 1, 200, 300, 50, 16, 12, 20, 500, 4e-2),
    Problem("Navier-Stokes", (32, 32), 1e-3, 4, 3, 20, 120, 30, 12, 6, 10, 60, 2e-2),
)
FULL = (
    Problem("Navier-Stokes", (64, 64), 1e-3, 10, 5, 50, 1000, 200, 20, 12, 20, 1500, 4e-3),
    Problem("Burgers", (1024,), 0.002, 1, 1, 4000, 1000, 200, 64, 16, 20, 5000, 4e-3),
)


def main() -> int:
    options = arguments(__doc__).parse_args()
    rows: list[list[str]] = []
    results: dict[str, dict[str, Any]] = {}
    for problem in FULL if options.full else SMALL:
        out = options.out / problem.name.lower()
        data = problem.data(0, device())
        runs: dict[str, list[Curve]] = {FNO: [], MONARCH: []}
        for seed in seeds(options):
            for name, curves in runs.items():
                torch.manual_seed(seed)
                model = NeuralOperator(problem, learned=name == MONARCH)
                settings = Settings(
                    out, options.steps or problem.steps, problem.lr, seed=seed, weight_decay=1e-4, evaluations=4
                )
                curves.append(learn(f"{name}, seed {seed}", model, problem, data, settings))
                results[f"{problem.name}, {name}"] = {
                    "parameters": numbers(model),
                    ERROR: [curve.last(ERROR) for curve in curves],
                    "step_s": [curve.step_seconds() for curve in curves],
                }
                save_curves(out, runs, ERROR, {**vars(options), "problem": problem})
                write_json(options.out / "pde.json", {"results": results, "paper": PAPER})
    for name, found in results.items():
        row = [f"{found['parameters']:,}", spread(found[ERROR], ".4f"), spread(found["step_s"], ".1f", 1e3)]
        rows.append([name, *row])
    print_table(["", "real parameters", f"{ERROR}, test", "ms a step"], rows)
    print(PAPER, flush=True)
    return 0


def learn(name: str, model: nn.Module, problem: Problem, data: Tensor, settings: Settings) -> Curve:
    states = data / data[: problem.training].std()

    def batch(step: int) -> Tensor:
        return states[picks(problem.training, problem.batch, step, settings.seed).to(states.device)]

    def loss(run: nn.Module, states: Tensor) -> Tensor:
        """Mean relative error of the single states, as FNO's."""
        found, exact = foretold(run, states[:, : problem.seen], problem.ahead), states[:, problem.seen :]
        return relative(found.flatten(0, 1), exact.flatten(0, 1)).mean()

    def evaluate(run: nn.Module) -> Figures:
        parts = states[problem.training :].split(problem.batch)
        found = [foretold(run, part[:, : problem.seen], problem.ahead) for part in parts]
        return {ERROR: float(relative(torch.cat(found), states[problem.training :, problem.seen :]).mean())}

    return train(name, model, loss, batch, settings, evaluate, groups=groups(model, settings))


def groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Learned transforms move slower than the rest, and don't decay: they start where they are good."""
    transforms = [p for name, p in model.named_parameters() if ".transforms." in name]
    others = [p for name, p in model.named_parameters() if ".transforms." not in name]
    found = [{"params": others, "lr": settings.lr, "weight_decay": settings.weight_decay}]
    if transforms:
        found.append({"params": transforms, "lr": TRANSFORM_LR * settings.lr, "weight_decay": 0.0})
    return found


def foretold(model: nn.Module, seen: Tensor, ahead: int) -> Tensor:
    """The states that come next, (examples, ahead, *shape), each from the last ones before it."""
    found = []
    for _ in range(ahead):
        found.append(model(seen))
        seen = torch.cat([seen[:, 1:], found[-1]], 1)
    return torch.cat(found, 1)


def relative(found: Tensor, exact: Tensor) -> Tensor:
    """Relative L2 error of every example, (batch,)."""
    return (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)


def numbers(model: nn.Module) -> int:
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in model.parameters())


class Spectral(nn.Module):
    """Transform, a matrix over channels for each low frequency, inverse transform, real part."""

    def __init__(self, width: int, shape: tuple[int, ...], modes: int, learned: bool) -> None:
        super().__init__()
        self.shape, self.dims = shape, tuple(range(2, 2 + len(shape)))
        low = (torch.arange(shape[-1]) < modes).expand(shape)  # x is real: the negative ones are their conjugates
        if len(shape) == 2:
            low = low & (torch.fft.fftfreq(shape[0], 1 / shape[0]).abs() < modes).unsqueeze(-1)
        twice = torch.where(torch.arange(shape[-1]) == 0, 1.0, 2.0).expand(shape)
        self.register_buffer("frequencies", low.flatten().nonzero().squeeze(-1))
        self.register_buffer("count", twice.flatten()[self.frequencies])
        values = torch.randn(len(self.frequencies), width, width, dtype=torch.complex64) / width
        self.channels = nn.Parameter(values)  # (frequencies, in, out)
        self.transforms = nn.ModuleList()
        if learned:
            pair = (dft, idft) if len(shape) == 1 else (dft2, idft2)
            self.transforms.extend(LearnedTransform(make(*shape, norm="ortho")) for make in pair)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, *shape) -> the same."""
        if self.transforms:
            spectrum = self.transforms[0](x.flatten(2))
        else:
            spectrum = torch.fft.fftn(x, dim=self.dims, norm="ortho").flatten(2)
        low = torch.einsum("bif,fio->bof", spectrum[..., self.frequencies], self.channels) * self.count
        mixed = torch.zeros_like(spectrum).index_copy(2, self.frequencies, low)
        if self.transforms:
            return self.transforms[1](mixed).real.unflatten(2, self.shape)
        return torch.fft.ifftn(mixed.unflatten(2, self.shape), dim=self.dims, norm="ortho").real


class NeuralOperator(nn.Module):
    """Four layers of spectral and pointwise products between pointwise ones, on states and coordinates."""

    def __init__(self, problem: Problem, learned: bool) -> None:
        super().__init__()
        axes = (torch.arange(n) / n for n in problem.shape)
        self.register_buffer("places", torch.stack(torch.meshgrid(*axes, indexing="ij")), persistent=False)
        width = problem.width
        self.lift = Pointwise(problem.seen + len(problem.shape), width)
        self.spectral = nn.ModuleList(Spectral(width, problem.shape, problem.modes, learned) for _ in range(4))
        self.pointwise = nn.ModuleList(Pointwise(width, width) for _ in range(4))
        self.project = nn.Sequential(Pointwise(width, 4 * width), nn.GELU(), Pointwise(4 * width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """States after each other (batch, seen, *shape) -> the next one, (batch, 1, *shape)."""
        x = self.lift(torch.cat([x, self.places.expand(len(x), *self.places.shape)], dim=1))
        for index, (spectral, pointwise) in enumerate(zip(self.spectral, self.pointwise, strict=True)):
            x = spectral(x) + pointwise(x)
            x = F.gelu(x) if index < 3 else x
        return self.project(x)


class Pointwise(nn.Linear):
    """A linear layer over channels, dimension 1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


if __name__ == "__main__":
    sys.exit(main())

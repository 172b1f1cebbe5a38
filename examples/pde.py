"""Neural operators for Burgers and Navier-Stokes, with Fourier transforms that are fixed, and that are learned.

The Fourier neural operator (Li et al. 2021) multiplies low frequencies by learned matrices. The Monarch neural operator
is the same, but its transforms are Monarch matrices that start as the Fourier transform and its inverse (Dao et al.
2022, section 5.1). Both start with the same values, and so with the same outputs. Data come from our own solver
(``examples/solver.py``): the initial state is mapped to the state at the end.

    python -m examples.pde --out results/pde
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.solver import TAU, burgers, navier_stokes, random_fields
from examples.training import Curve, Figures, Settings, arguments, picks, print_table, save_curves, train, write_json
from monarch_fx.transforms import LearnedTransform, dft, dft2, idft, idft2

PAPER = (  # Dao et al. 2022, table 3: relative error on Navier-Stokes, 64 x 64, for three viscosities
    "the authors, Navier-Stokes with viscosity 1e-3 / 1e-4 / 1e-5: "
    "FNO 0.017 / 0.178 / 0.155, Monarch-NO 0.010 / 0.145 / 0.136"
)
ERROR = "relative error"
FNO, MONARCH = "FNO", "Monarch-NO"


@dataclass(frozen=True)
class Problem:
    """One equation at one size.

    Attributes:
        time: Of the state to be predicted.
        lr: Peak learning rate by model. Of the small sizes the best for each from 1e-3 to 4e-2 (Navier-Stokes 2e-3 to
            2e-2), in steps of two, by the test error of seed 0; those of the full sizes were not tried.
    """

    name: str
    shape: tuple[int, ...]
    viscosity: float
    time: float
    solver_steps: int
    training: int
    testing: int
    width: int
    modes: int
    batch: int
    steps: int
    lr: Mapping[str, float]

    def solve(self, states: Tensor) -> Tensor:
        if len(self.shape) == 1:
            return burgers(states, self.viscosity, self.time, self.solver_steps)
        x = torch.arange(self.shape[0], device=states.device) / self.shape[0]
        phase = TAU * (x.unsqueeze(-1) + x)
        force = 0.1 * (torch.sin(phase) + torch.cos(phase))
        return navier_stokes(states, self.viscosity, self.time, self.solver_steps, force)

    def data(self, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Initial states and what becomes of them, (examples, 1, *shape); the distributions are those of FNO's code."""
        scale, tau, alpha = (25.0, 5.0, 2.0) if len(self.shape) == 1 else (7**1.5, 7.0, 2.5)
        count = self.training + self.testing
        start = random_fields(count, self.shape, scale, tau, alpha, seed).to(device)
        return start.unsqueeze(1), self.solve(start).unsqueeze(1)


SMALL = (
    Problem("Burgers", (64,), 0.01, 1.0, 200, 300, 50, 16, 12, 20, 500, {FNO: 4e-2, MONARCH: 2e-2}),
    Problem("Navier-Stokes", (32, 32), 1e-3, 10.0, 200, 120, 30, 12, 6, 10, 180, {FNO: 2e-2, MONARCH: 1e-2}),
)
FULL = (
    Problem("Burgers", (1024,), 0.002, 1.0, 4000, 1000, 200, 64, 16, 20, 10000, {FNO: 4e-3, MONARCH: 2e-3}),
    Problem("Navier-Stokes", (64, 64), 1e-4, 20.0, 2000, 1000, 200, 32, 12, 20, 10000, {FNO: 4e-3, MONARCH: 2e-3}),
)


def main() -> int:
    options = arguments(__doc__).parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, results = [], {}
    for problem in FULL if options.full else SMALL:
        out, steps = options.out / problem.name.lower(), options.steps or problem.steps
        data = problem.data(options.seed, device)
        curves = {}
        for name, lr in problem.lr.items():
            torch.manual_seed(options.seed)
            model = NeuralOperator(problem, learned=name == MONARCH)
            settings = Settings(out, steps, lr, seed=options.seed, weight_decay=1e-4)
            curves[name] = curve = learn(name, model, problem, data, settings)
            results[f"{problem.name}, {name}"] = {
                "parameters": numbers(model),
                ERROR: curve.last(ERROR),
                "step_s": curve.step_seconds(),
            }
            row = (f"{numbers(model):,}", f"{curve.last(ERROR):.4f}", f"{curve.step_seconds() * 1e3:.1f}")
            rows.append([f"{problem.name}, {name}", *row])
        save_curves(out, curves, ERROR, {**vars(options), "problem": problem})
    print_table(["", "real parameters", f"{ERROR}, test", "ms a step"], rows)
    print(PAPER)
    write_json(options.out / "pde.json", {"results": results, "paper": PAPER})
    return 0


def learn(name: str, model: nn.Module, problem: Problem, data: tuple[Tensor, Tensor], settings: Settings) -> Curve:
    count = problem.training
    scales = [values[:count].std() for values in data]
    x, y = (values / scale for values, scale in zip(data, scales, strict=True))

    def batch(step: int) -> tuple[Tensor, Tensor]:
        index = picks(count, problem.batch, step, settings.seed).to(x.device)
        return x[index], y[index]

    def evaluate(run: nn.Module) -> Figures:
        parts = range(count, len(x), problem.batch)
        errors = [relative(run(x[i : i + problem.batch]), y[i : i + problem.batch]) for i in parts]
        return {ERROR: float(torch.cat(errors).mean())}

    return train(name, model, lambda run, pair: relative(run(pair[0]), pair[1]).mean(), batch, settings, evaluate)


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
        self.lift = Pointwise(1 + len(problem.shape), width)
        self.spectral = nn.ModuleList(Spectral(width, problem.shape, problem.modes, learned) for _ in range(4))
        self.pointwise = nn.ModuleList(Pointwise(width, width) for _ in range(4))
        self.project = nn.Sequential(Pointwise(width, 4 * width), nn.GELU(), Pointwise(4 * width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, *shape) -> the same."""
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

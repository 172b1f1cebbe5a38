"""Accelerated MRI: reconstruction by an inverse Fourier transform that is learned, as a complex Monarch matrix.

Several coils see an image through their sensitivities, and only a part of the frequencies is measured: y = mask F S x +
noise. SENSE with zeros for what is missing sums S^* F^-1 y over the coils (Pruessmann et al. 1999). Monarch-SENSE is
the same with a learned matrix that starts as F^-1 (Dao et al. 2022, section 5.1). Both can go on from the image that
they find: what it would not have given of the measured frequencies goes through F^-1 again (Landweber's iteration),
through another learned matrix each time. CG-SENSE solves for the image by conjugate gradients, damped and stopped as is
best on the training slices. Slices are real, coils and noise are simulated: training on a template (the average of 152
heads), tests on slices of two people.

    pip install -r examples/requirements-training.txt -r examples/requirements-mri.txt
    pip install --no-deps -r examples/requirements-mri-data.txt
    python -m examples.mri --out results/mri
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.curves import Curve, print_table, save_curves, save_images, spread, write_json
from examples.training import Figures, Settings, arguments, device, picks, seeds, train
from monarch_fx.transforms import LearnedTransform, idft2

PAPER = (  # Dao et al. 2022, table 4, its first rows; SENSE is the one with zeros, mSENSE Monarch's
    "the authors, SKM-TEA knees, first echo, 2x: SENSE 32.8 dB and 0.871, mSENSE 34.3 dB and 0.886"
)
ROUNDS = 4
ZERO, AGAIN, CG = "SENSE, zero-filled", f"SENSE, {ROUNDS} rounds", "CG-SENSE"
MONARCH = {"Monarch-SENSE": 1, f"Monarch-SENSE, {ROUNDS} rounds": ROUNDS}
NOISE = 0.01  # standard deviation of a measured frequency's parts, where the brightest tissue is 1


@dataclass(frozen=True)
class Size:
    side: int
    coils: int
    batch: int
    steps: int
    lr: float


SMALL = Size(side=64, coils=4, batch=8, steps=400, lr=1e-3)
FULL = Size(side=128, coils=8, batch=16, steps=2000, lr=1e-3)  # most test slices have 128 x 128 pixels
ACCELERATIONS = (2, 4)


class MonarchSense(nn.Module):
    """Coil images by learned inverse transforms, combined by their sensitivities; one transform a round."""

    def __init__(self, coils: Tensor, rounds: int = 1) -> None:
        super().__init__()
        self.register_buffer("coils", coils)
        self.inverses = nn.ModuleList(LearnedTransform(idft2(*coils.shape[1:], norm="ortho")) for _ in range(rounds))

    def forward(self, measured: Tensor, mask: Tensor) -> Tensor:
        """(batch, coils, side, side), (batch or 1, side, side) -> (batch, side, side)."""
        image, missed = torch.zeros_like(measured[:, 0]), measured
        for index, inverse in enumerate(self.inverses):
            if index:
                missed = measured - mask.unsqueeze(1) * spectrum(image, self.coils)
            found = inverse(missed.flatten(2)).unflatten(2, measured.shape[2:])
            image = image + (self.coils.conj() * found).sum(1)
        return image


def main() -> int:
    options = arguments(__doc__).parse_args()
    size = FULL if options.full else SMALL
    coils = sensitivities(size.coils, size.side).to(device())
    training, testing = (images.to(device()) for images in (template(size.side), people(size.side)))
    results: dict[str, dict[str, list[float]]] = {}
    runs: dict[str, list[Curve]] = {}
    shown = {"image": testing}
    for seed in seeds(options):
        for acceleration in ACCELERATIONS:
            settings = Settings(options.out, options.steps or size.steps, size.lr, seed=seed, weight_decay=0.0)
            test_mask = masks(1, size.side, acceleration, -1, device())
            measured = measure(testing, coils, test_mask, seed=-1)
            found = {}
            if seed == options.seed:  # of these there are no others
                chosen = best_cg(training[:: len(training) // 50], coils, test_mask)
                found = {ZERO: combine(measured, coils), CG: cg_sense(measured, coils, test_mask, *chosen)}
                with torch.no_grad():
                    found[AGAIN] = MonarchSense(coils, ROUNDS).to(device())(measured, test_mask)

            def batch(step: int, acceleration: int = acceleration, seed: int = seed) -> tuple[Tensor, ...]:
                images = training[picks(len(training), size.batch, step, seed).to(device())]
                seed = step + 1_000_003 * seed
                mask = masks(size.batch, size.side, acceleration, seed, device())
                return measure(images, coils, mask, seed), mask, images

            def evaluate(model: nn.Module, measured: Tensor = measured, mask: Tensor = test_mask) -> Figures:
                return quality(model(measured, mask), testing)

            for method, rounds in MONARCH.items():
                model, name = MonarchSense(coils, rounds), f"{method}, {acceleration}x"
                curve = train(f"{name}, seed {seed}", model, loss, batch, settings, evaluate)
                runs.setdefault(name, []).append(curve)
                with torch.no_grad():
                    found[method] = model(measured, test_mask)
            for method, images in found.items():
                kept = results.setdefault(f"{method}, {acceleration}x", {"PSNR": [], "SSIM": []})
                for key, value in quality(images, testing).items():
                    kept[key].append(value)
                shown[f"{method}, {acceleration}x"] = images
            save_curves(options.out, runs, "PSNR", {**vars(options), "size": size})
            report(results, runs, options.out)
        save_images(options.out, {name: images[[0, 5]].abs().cpu().numpy() for name, images in shown.items()})
    return 0


def report(results: dict[str, dict[str, list[float]]], runs: dict[str, list[Curve]], out: Path) -> None:
    step_s = {name: [curve.step_seconds() for curve in curves] for name, curves in runs.items()}
    rows = []
    for name, found in results.items():
        time = spread(step_s[name], ".1f", 1e3) if name in step_s else "-"
        rows.append([name, spread(found["PSNR"], ".2f"), spread(found["SSIM"], ".3f"), time])
    print_table(["", "PSNR (dB)", "SSIM", "ms a step"], rows)
    print(PAPER, flush=True)
    write_json(out / "mri.json", {"results": results, "step_s": step_s, "paper": PAPER})


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Of magnitudes, as the quality is."""
    measured, mask, images = batch
    return (model(measured, mask).abs() - images).square().mean()


def spectrum(images: Tensor, coils: Tensor) -> Tensor:
    """What coils see of images (batch, side, side), in frequencies: (batch, coils, side, side)."""
    return torch.fft.fft2(images.unsqueeze(1) * coils, norm="ortho")


def measure(images: Tensor, coils: Tensor, mask: Tensor, seed: int) -> Tensor:
    """What coils measure of real images (batch, side, side): (batch, coils, side, side), zero where not measured."""
    generator = torch.Generator(images.device).manual_seed(seed % 2**63)
    sizes = len(images), *coils.shape
    noise = torch.randn(sizes, dtype=torch.complex64, generator=generator, device=images.device)
    return mask.unsqueeze(1) * (spectrum(images, coils) + math.sqrt(2) * NOISE * noise)


def combine(measured: Tensor, coils: Tensor) -> Tensor:
    """SENSE with zeros for what was not measured, (batch, side, side)."""
    return (coils.conj() * torch.fft.ifft2(measured, norm="ortho")).sum(1)


def best_cg(images: Tensor, coils: Tensor, mask: Tensor) -> tuple[int, float]:
    """Iterations and damping of ``cg_sense`` with the best PSNR on these images: more of the one, or less of the other,
    fit noise."""
    measured = measure(images, coils, mask, seed=-2)
    choices = itertools.product((1, 2, 3, 4, 6, 8, 12, 20), (1e-3, 1e-2, 0.03, 0.1, 0.3))
    return max(choices, key=lambda choice: quality(cg_sense(measured, coils, mask, *choice), images)["PSNR"])


def cg_sense(measured: Tensor, coils: Tensor, mask: Tensor, iterations: int, damping: float = 1e-2) -> Tensor:
    """Least squares by conjugate gradients, with a small multiple of the identity added."""

    def normal(x: Tensor) -> Tensor:
        return combine(mask.unsqueeze(1) * spectrum(x, coils), coils) + damping * x

    x = torch.zeros_like(measured[:, 0])
    residual = direction = combine(measured, coils)
    square = energy(residual)
    for _ in range(iterations):
        image = normal(direction)
        step = square / (direction.conj() * image).real.sum((1, 2), keepdim=True)
        x, residual = x + step * direction, residual - step * image
        square, before = energy(residual), square
        direction = residual + square / before * direction
    return x


def energy(x: Tensor) -> Tensor:
    return x.abs().square().sum((1, 2), keepdim=True)


def masks(count: int, side: int, acceleration: int, seed: int, at: torch.device | None = None) -> Tensor:
    """Random frequencies, ``side^2 / acceleration`` of them, dense in the middle: (count, side, side) of 0 and 1."""
    k = torch.fft.fftfreq(side, device=at)
    radius = (k.square() + k.unsqueeze(-1).square()).sqrt()
    density = (1 + (radius / 0.12).square()) ** -1.5
    generator = torch.Generator(k.device).manual_seed(seed % 2**63)
    draws = torch.rand(count, side, side, generator=generator, device=at).log() / density
    draws = draws.where(radius > 0.06, 0.0)  # the middle is always measured
    threshold = draws.flatten(1).topk(side**2 // acceleration).values[:, -1]
    return (draws >= threshold.view(-1, 1, 1)).float()


def sensitivities(count: int, side: int) -> Tensor:
    """Coils on a circle around the image, with smooth magnitudes and phases, (count, side, side); squares sum to 1."""
    x = torch.linspace(-1, 1, side)
    angles = 2 * math.pi * torch.arange(count).view(-1, 1, 1) / count
    along, across = 1.1 * torch.sin(angles), 1.1 * torch.cos(angles)
    distance = (x.unsqueeze(-1) - along).square() + (x - across).square()
    phase = angles + along * x.unsqueeze(-1) + across * x
    coils = torch.polar(torch.exp(-distance / 1.5), phase)
    return coils / coils.abs().square().sum(0).sqrt()


def template(side: int) -> Tensor:
    """Axial slices of the T1 template, each way around, (slices, side, side)."""
    volume = read("nilearn", "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz")
    slices = squares([volume[:, :, z] for z in range(30, 140, 2)], side)
    return torch.cat([slices.rot90(turn, (1, 2)) for turn in range(4)])


def people(side: int) -> Tensor:
    """A coronal T1 slice of one person, and ten axial slices without diffusion weighting of another."""
    (folder,) = importlib.util.find_spec("dipy").submodule_search_locations
    coronal = np.load(Path(folder) / "data/files/t1_coronal_slice.npy")
    volume = read("dipy", "data/files/S0_10slices.nii.gz")[..., 0]
    return squares([coronal, *np.moveaxis(volume, 2, 0)], side)


def read(package: str, file: str) -> np.ndarray:
    import nibabel

    (folder,) = importlib.util.find_spec(package).submodule_search_locations
    return nibabel.load(Path(folder) / file).get_fdata()


def squares(slices: list[np.ndarray], side: int) -> Tensor:
    """Padded to squares, brought to a size, and to tissue of about 1: the 99.5th percentile, where they are cut."""
    images = []
    for values in slices:
        image = torch.from_numpy(values).float()
        height, width = image.shape
        image = F.pad(image, (0, max(0, height - width), 0, max(0, width - height)))
        image = F.interpolate(image[None, None], (side, side), mode="bilinear", antialias=True)[0, 0]
        images.append((image / image.quantile(0.995)).clamp(0, 1))
    return torch.stack(images)


def quality(found: Tensor, images: Tensor) -> Figures:
    """Means over images of PSNR and SSIM (Wang et al. 2004) of magnitudes, of a range of 1."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    magnitudes = found.abs()
    errors = (magnitudes - images).square().mean((1, 2))
    return {
        "PSNR": float(-10 * errors.log10().mean()),
        "SSIM": float(ssim(magnitudes.unsqueeze(1), images.unsqueeze(1), data_range=1.0)),
    }


if __name__ == "__main__":
    sys.exit(main())

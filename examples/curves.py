"""What training runs write down, and the picture of it.

    python -m examples.curves results/*

draws ``curves.png`` in every folder that has a ``curves.json``, and its images. Where matplotlib is installed, examples
have done so already.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Curve:
    """What a run writes down.

    Attributes:
        steps: After which a loss was written down.
        losses: Mean training loss since the entry before.
        step_s: Seconds of one step since then, without evaluations. Intervals in which something was compiled, at the
            start and after the switch, are left out.
        evaluated: Steps of the evaluations.
        figures: What they gave, by name.
        densified: The step before which the factors were multiplied out.
        left_out_s: Seconds of the intervals that are left out, which are mostly compilation.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)
    densified: int | None = None
    left_out_s: float = 0.0

    def step_seconds(self, after: int = 0, until: float = math.inf) -> float:
        """Median seconds of a step, of those after ``after`` and up to ``until``; NaN where none was timed."""
        found = [s for at, s in zip(self.steps, self.step_s, strict=True) if after < at <= until]
        return statistics.median(found) if found else math.nan

    def phases(self) -> list[float]:
        """Median seconds of a step, before the switch and after it."""
        if self.densified is None:
            return [self.step_seconds()]
        return [self.step_seconds(until=self.densified), self.step_seconds(after=self.densified)]

    def seconds(self, step: int) -> float:
        """Training time up to a step, without compilation: medians before and after the switch, so that a busy moment
        doesn't count."""
        before, *after = self.phases()
        switch = step if self.densified is None else min(step, self.densified)
        return switch * before + sum((step - switch) * s for s in after if step > switch)

    def last(self, name: str) -> float:
        return self.figures[name][-1]

    def at_time(self, name: str, seconds: float) -> float:
        """The figure after so much training time, between evaluations on a straight line."""
        return float(np.interp(seconds, [self.seconds(step) for step in self.evaluated], self.figures[name]))

    def time_to(self, name: str, value: float) -> float:
        """Seconds of training until the figure is ``value`` or less, between evaluations on a straight line.

        Raises:
            ValueError: It never is.
        """
        figures, times = self.figures[name], [self.seconds(step) for step in self.evaluated]
        for i, figure in enumerate(figures):
            if figure <= value:
                before = max(0, i - 1)
                span = figures[before] - figure
                return times[i] if not span else times[i] - (times[i] - times[before]) * (value - figure) / span
        raise ValueError(f"{name} never came down to {value:.4g}.")


Runs = Mapping[str, Sequence[Curve]]  # of every name one for each seed


def save_curves(out: Path, runs: Runs, figure: str, settings: Mapping[str, Any]) -> None:
    """Writes ``curves.json``, and draws it where matplotlib is installed."""
    data = {name: [dataclasses.asdict(curve) for curve in curves] for name, curves in runs.items()}
    settings = {key: str(value) for key, value in settings.items()}
    write_json(out / "curves.json", {"settings": settings, "figure": figure, "curves": data})
    if importlib.util.find_spec("matplotlib") is not None:
        draw(out)


def draw(folder: Path) -> None:
    """``curves.png`` of ``curves.json``: the figure against steps, and against training time; a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = json.loads((folder / "curves.json").read_text())
    figure = data["figure"]
    drawing, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for index, (name, runs) in enumerate(data["curves"].items()):
        for seed, values in enumerate(runs):
            curve = Curve(**values)
            style = {"color": f"C{index}", "linewidth": 1.2, "label": None if seed else name}
            axes[0].plot(curve.evaluated, curve.figures[figure], **style)
            axes[1].plot([curve.seconds(step) for step in curve.evaluated], curve.figures[figure], **style)
    axes[0].set(xlabel="steps", ylabel=figure)
    axes[1].set(xlabel="seconds of training, without compilation")
    axes[0].legend()
    drawing.tight_layout()
    drawing.savefig(folder / "curves.png", dpi=120)
    plt.close(drawing)


def save_images(out: Path, images: Mapping[str, np.ndarray]) -> None:
    """Writes ``images.npz``, of every name (count, height, width) from 0 to 1, and draws it like the curves."""
    replace(out / "images.npz", lambda temporary: _compressed(temporary, images))
    if importlib.util.find_spec("matplotlib") is not None:
        draw_images(out)


def _compressed(path: Path, images: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **{name: values.astype(np.float16) for name, values in images.items()})


def draw_images(folder: Path) -> None:
    """``images.png`` of ``images.npz``: a column for each name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    images = np.load(folder / "images.npz")
    count = len(images[images.files[0]])
    figure, axes = plt.subplots(count, len(images.files), figsize=(2.2 * len(images.files), 2.4 * count), squeeze=False)
    for column, name in enumerate(images.files):
        for row, values in enumerate(images[name]):
            axes[row, column].imshow(values.astype(np.float32), cmap="gray", vmin=0, vmax=1)
            axes[row, column].set_axis_off()
        axes[0, column].set_title(name, fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "images.png", dpi=120)
    plt.close(figure)


def spread(values: Sequence[float], form: str, scale: float = 1.0) -> str:
    """Mean of what the seeds gave, and its standard deviation where there are several."""
    mean = format(statistics.fmean(values) * scale, form)
    return mean if len(values) < 2 else f"{mean} ± {format(statistics.stdev(values) * scale, form)}"


def milliseconds(steps: list[float]) -> str:
    """Of a step, before the switch and after it."""
    return ", then ".join(f"{seconds * 1e3:.1f}" for seconds in steps)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), flush=True)


def write_json(path: Path, data: Any) -> None:
    """Whole or not at all."""
    replace(path, lambda temporary: temporary.write_text(json.dumps(data, indent=1) + "\n"))


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside ``path`` and renames, so that a stopped run leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(temporary)
    os.replace(temporary, path)


def main() -> int:
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("The curves need matplotlib: pip install -r examples/requirements-training.txt")
    folders = [folder for folder in map(Path, sys.argv[1:]) if (folder / "curves.json").exists()]
    if not folders:
        sys.exit("Give folders with a curves.json, such as an example's --out.")
    for folder in folders:
        draw(folder)
        print(folder / "curves.png")
        if (folder / "images.npz").exists():
            draw_images(folder)
            print(folder / "images.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m benchmarks list`` and ``python -m benchmarks run NAME [NAME ...]``."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

import benchmarks.choices
import benchmarks.cpu
import benchmarks.generation
import benchmarks.gpu
import benchmarks.gpu_models
import benchmarks.halves
import benchmarks.launched
import benchmarks.layers
import benchmarks.nodes
import benchmarks.planning
import benchmarks.predictions
import benchmarks.quality
import benchmarks.tf32
import benchmarks.training
import benchmarks.unaligned  # noqa: F401  (registers its benchmarks)
from benchmarks.registry import BENCHMARKS, RESULTS, Benchmark, Table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names of all benchmarks")
    run = commands.add_parser("run", help="run benchmarks and write results/NAME.json and .md")
    run.add_argument("names", nargs="+", choices=sorted(BENCHMARKS), metavar="NAME")
    arguments = parser.parse_args()
    if arguments.command == "list":
        for entry in BENCHMARKS.values():
            print(f"{entry.name:26} {entry.summary}")
        return
    for name in arguments.names:
        run_one(BENCHMARKS[name])


def run_one(entry: Benchmark) -> None:
    torch.manual_seed(0)
    start = time.perf_counter()
    made = entry.run()
    for table in [made] if isinstance(made, Table) else made:
        write(entry, table, start, complete=False)
        print(" | ".join(table.rows[-1]), file=sys.stderr, flush=True)
    print(write(entry, table, start, complete=True))


def write(entry: Benchmark, table: Table, start: float, complete: bool) -> str:
    """Both files of a result; gives the text of the one for people."""
    about: dict[str, str | int] = {
        "command": f"python -m benchmarks run {entry.name}",
        "date": time.strftime("%Y-%m-%d"),
        "took_s": round(time.perf_counter() - start),
        **({} if complete else {"incomplete": "cut off after the last row"}),
        **machine(),
    }
    text = markdown(entry, table, about)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{entry.name}.md").write_text(text)
    (RESULTS / f"{entry.name}.json").write_text(json.dumps({**about, **asdict(table)}, indent=1) + "\n")
    return text


def machine() -> dict[str, str | int]:
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": cpu,
        "simd": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: metadata.version(name) for name in ("triton", "transformers") if installed(name)},
        **({"gpu": torch.cuda.get_device_name(), "cuda": f"{torch.version.cuda}"} if torch.cuda.is_available() else {}),
    }


def installed(name: str) -> bool:
    return any(metadata.distributions(name=name))


def markdown(entry: Benchmark, table: Table, about: dict[str, str | int]) -> str:
    lines = [f"# {entry.name}", "", entry.summary, ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += ["", "| " + " | ".join(table.header) + " |", "|" + "---|" * len(table.header)]
    lines += ["| " + " | ".join(row) + " |" for row in table.rows]
    lines += ["", *(f"- {target}" for target in table.targets)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

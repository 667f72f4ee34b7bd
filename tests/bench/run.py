"""Measures ckptkit against what the machine can do: whole processes, side by side.

    python tests/bench/run.py [--size-gib 1] [--dir DIR] [--repeat 5] [--markdown]

Makes two checkpoints of the given size from random bytes, removes them at the end, and measures

- opening: ``ckptkit inspect``, between an empty Python and one that imports torch
- writing: ``ckptkit convert``, between ``cp`` and torch with the safetensors library

The commands of a group run in turn, every other round backwards (A B C, C B A), after one round
that is not counted; medians are printed with the fastest and the slowest run.  CPU is user and
system time together.  Peak memory is the kernel's high-water mark, which counts mapped file pages
too, and is never below that of this program, which starts the commands.

The page cache is warm: the sources were just written and read.  Before each run, outside the
measured time, a copy of the source is made and removed, so that the memory for the output is at
hand (a virtual machine may have given it back to its host), and the disk is flushed.  ckptkit
flushes its output to disk before it names it; ``cp`` does not, so ``cp`` with ``sync`` is measured
beside it.  No test asserts a time.  Linux and macOS only.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CKPTKIT = [sys.executable, "-m", "ckptkit"]

MAKE = """
import argparse, sys
from unittest import mock
import torch

torch.manual_seed(0)
size, state_path, resume_path = int(sys.argv[1]), sys.argv[2], sys.argv[3]

def network(nbytes):
    # Twenty-four blocks of eight tensors, as in a transformer: four large ones carry nearly all bytes.
    blocks, numel = 24, nbytes // 4
    width = max(8, int((numel / (12 * blocks)) ** 0.5) // 8 * 8)
    shapes = {"qkv.weight": (3 * width, width), "qkv.bias": (3 * width,), "proj.weight": (width, width),
              "proj.bias": (width,), "fc1.weight": (4 * width, width), "fc1.bias": (4 * width,),
              "fc2.weight": (width, 4 * width), "norm.weight": (width,)}
    named = [(f"module.blocks.{i}.{name}", shape) for i in range(blocks) for name, shape in shapes.items()]
    weights = {name: torch.randn(shape) for name, shape in named}
    left = numel - sum(weight.numel() for weight in weights.values())
    if left > 0:
        weights["module.head.weight"] = torch.randn(left)
    return weights

with mock.patch("torch.serialization.location_tag", lambda storage: "cuda:0"):
    torch.save(network(size), state_path)
    weights, first, second = (network(size // 3) for _ in range(3))
    state = {i: {"step": torch.tensor(100.0), "exp_avg": a, "exp_avg_sq": b * b}
             for i, (a, b) in enumerate(zip(first.values(), second.values()))}
    torch.save({"epoch": 7, "state_dict": weights, "best_acc1": 71.5, "args": argparse.Namespace(lr=0.1, arch="vit"),
                "optimizer": {"state": state, "param_groups": [{"lr": 0.1, "params": list(range(len(weights)))}]},
                "scheduler": {"last_epoch": 7}}, resume_path)
print(torch.__version__)
"""

TORCH_CONVERT = """
import sys, torch
from safetensors.torch import save_file
state = torch.load(sys.argv[1], map_location="cpu", mmap=True, weights_only=True)
save_file({name.removeprefix("module."): tensor.contiguous() for name, tensor in state.items()}, sys.argv[2])
"""


@dataclass(frozen=True)
class Command:
    """One way to do it.

    Attributes:
        name: as printed.
        argv: the process.
        source, output: the file it reads, and the one it makes, which is removed after each run.
    """

    name: str
    argv: list[str]
    source: Path | None = None
    output: Path | None = None


@dataclass(frozen=True)
class Run:
    """What one process took: seconds, seconds of CPU, bytes of peak memory."""

    wall: float
    cpu: float
    peak: int


def run(command: Command) -> Run:
    """Run one command to its end.

    Raises:
        SystemExit: it failed; its error output is in the message.
    """
    if command.source is not None and command.output is not None:
        shutil.copyfile(command.source, command.output)
        command.output.unlink()
    os.sync()
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command.argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            errors.seek(0)
            message = errors.read().decode(errors="replace").strip()
            raise SystemExit(f"{command.name}: exit code {process.returncode}: {message}")
    if command.output is not None:
        command.output.unlink()
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(wall=wall, cpu=usage.ru_utime + usage.ru_stime, peak=usage.ru_maxrss * unit)


def measure(commands: list[Command], repeat: int) -> dict[str, list[Run]]:
    """The runs of each command, taken in turn."""
    runs: dict[str, list[Run]] = {command.name: [] for command in commands}
    for turn in range(repeat + 1):
        for command in reversed(commands) if turn % 2 else commands:
            print(f"\r  round {turn} of {repeat}: {command.name:60.60}", end="", file=sys.stderr, flush=True)
            result = run(command)
            if turn:  # round 0 warms caches, and compiles what Python has not compiled yet
                runs[command.name].append(result)
    print(f"\r{'':100}\r", end="", file=sys.stderr, flush=True)
    return runs


def table(runs: dict[str, list[Run]], baseline: str) -> Iterator[list[str]]:
    """Rows of medians, and their ratio to the median of ``baseline``."""
    base = statistics.median(run.wall for run in runs[baseline])
    for name, results in runs.items():
        walls = [run.wall for run in results]
        wall = statistics.median(walls)
        yield [
            name,
            f"{wall:.3f}",
            f"{min(walls):.3f}..{max(walls):.3f}",
            f"{wall / base:.2f}",
            f"{statistics.median(run.cpu for run in results):.3f}",
            f"{statistics.median(run.peak for run in results) / (1 << 20):.0f}",
        ]


HEAD = ["command", "wall s", "min..max", "ratio", "CPU s", "peak MiB"]


def show(title: str, rows: list[list[str]], *, markdown: bool) -> None:
    """Print one table."""
    widths = [max(len(row[column]) for row in [HEAD, *rows]) for column in range(len(HEAD))]

    def line(row: list[str]) -> str:
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width)
                 for i, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        return f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip()

    rule = [":" + "-" * (w - 1) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    print(f"### {title}\n" if markdown else title)
    print(line(HEAD))
    print(line(rule) if markdown else "  ".join("-" * width for width in widths))
    for row in rows:
        print(line(row))
    print()


# The machine.


def cpu() -> str:
    """The processor's name, as the kernel gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def file_system(folder: Path) -> str:
    """The type of the file system a folder lies in."""
    best, kind = "", "unknown"
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return kind
    for mount in mounts:
        _, place, this_kind, *_ = mount.split()
        if (folder / "x").is_relative_to(place) and len(place) >= len(best):
            best, kind = place, this_kind
    return kind


def facts(folder: Path, torch_version: str) -> dict[str, str]:
    """What the figures depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    version = subprocess.run([*CKPTKIT, "--version"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "machine": f"{cpu()}, {cores} cores, {memory:.0f} GiB memory, {platform.system()} {platform.release()}",
        "file system": f"{file_system(folder)}, page cache warm",
        "versions": f"Python {platform.python_version()}, torch {torch_version}, {version.stdout.strip()}",
    }


def groups(state: Path, resume: Path) -> dict[str, tuple[str, list[Command]]]:
    """The tables: title, baseline, commands."""
    copy, made, pth = (state.parent / name for name in ("copy.pth", "out.safetensors", "out.pth"))

    def copies(source: Path) -> list[Command]:
        flushed = ["sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", str(source), str(copy)]
        return [
            Command("cp", ["cp", str(source), str(copy)], source, copy),
            Command("cp, then sync", flushed, source, copy),
        ]

    def convert(source: Path, output: Path, *options: str) -> Command:
        name = " ".join(["convert to", output.suffix, *options])
        return Command(name, [*CKPTKIT, "convert", str(source), str(output), *options], source, output)

    portable = ("--map-location", "cpu", "--strip-module")
    torch_convert = [sys.executable, "-c", TORCH_CONVERT, str(state), str(made)]
    return {
        f"Opening a training checkpoint of {_gib(resume)}": (
            "python -c pass",
            [
                Command("python -c pass", [sys.executable, "-c", "pass"]),
                Command("inspect", [*CKPTKIT, "inspect", str(resume)]),
                Command("inspect --json", [*CKPTKIT, "inspect", "--json", str(resume)]),
                Command('python -c "import torch"', [sys.executable, "-c", "import torch"]),
            ],
        ),
        f"Rewriting a state_dict of {_gib(state)}": (
            "cp",
            [
                *copies(state),
                convert(state, made, "--strip-module"),
                convert(state, made, "--strip-module", "--no-check"),
                convert(state, pth, *portable),
                convert(state, pth, *portable, "--no-check"),
                Command("torch.load(mmap=True), then save_file", torch_convert, state, made),
            ],
        ),
        f"Rewriting a training checkpoint of {_gib(resume)}": (
            "cp",
            [*copies(resume), convert(resume, pth, *portable), convert(resume, pth, *portable, "--no-check")],
        ),
    }


def _gib(path: Path) -> str:
    return f"{path.stat().st_size / (1 << 30):.2f} GiB"


def main(arguments: list[str]) -> None:
    """Make the files, measure, print, remove the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size-gib", type=float, default=1.0, help="size of each checkpoint (default: 1)")
    parser.add_argument("--dir", type=Path, help="folder to work in; needs three times the size (default: temporary)")
    parser.add_argument("--repeat", type=int, default=5, help="counted runs of each command (default: 5)")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    options = parser.parse_args(arguments)
    if options.repeat < 1 or options.size_gib <= 0:
        parser.error("--repeat and --size-gib must be positive")
    nbytes = int(options.size_gib * (1 << 30))
    with tempfile.TemporaryDirectory(prefix="ckptkit-bench-", dir=options.dir) as name:
        folder = Path(name).resolve()
        if shutil.disk_usage(folder).free < 3.2 * nbytes:
            raise SystemExit(f"{folder}: {3.2 * options.size_gib:.1f} GiB are needed; choose another folder with --dir")
        state, resume = folder / "state_dict.pth", folder / "resume.pth"
        print("making the checkpoints ...", end="", file=sys.stderr, flush=True)
        made = subprocess.run(
            # A process of its own: what this one holds in memory would be counted with every command it starts.
            [sys.executable, "-c", MAKE, str(nbytes), str(state), str(resume)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        print(f"\r{'':100}\r", end="", file=sys.stderr, flush=True)
        for what, fact in facts(folder, made.stdout.strip()).items():
            print(f"- {what}: {fact}" if options.markdown else f"{what}: {fact}")
        print()
        for title, (baseline, commands) in groups(state, resume).items():
            rows = list(table(measure(commands, options.repeat), baseline))
            show(f"{title} (median of {options.repeat})", rows, markdown=options.markdown)


if __name__ == "__main__":
    main(sys.argv[1:])

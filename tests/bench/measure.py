"""Runs commands side by side, and prints what they took.

The commands of a group run in turn, every other round backwards (A B C, C B A), after one round
that is not counted; medians are printed with the fastest and the slowest run.  CPU is user and
system time together.  Peak memory is the kernel's high-water mark, which counts mapped file pages
too, and is never below that of this program, which starts the commands.
"""

from __future__ import annotations

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

Groups = dict[str, tuple[str, list["Command"]]]
"""Tables: from a title to the name of the baseline and the commands."""


@dataclass(frozen=True)
class Command:
    """One way to do it.

    Attributes:
        name: as printed.
        argv: the process.
        source: the file it reads, or one as large.
        output: the file it makes, or the folder for several, which is removed after each run.
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
        _remove(command.output)
        shutil.copyfile(command.source, command.source.with_suffix(".warm"))
        command.source.with_suffix(".warm").unlink()
        if not command.output.suffix:
            command.output.mkdir()
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
        _remove(command.output)
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(wall=wall, cpu=usage.ru_utime + usage.ru_stime, peak=usage.ru_maxrss * unit)


def _remove(output: Path) -> None:
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)


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


def gib(path: Path) -> str:
    """A file's size."""
    return f"{path.stat().st_size / (1 << 30):.2f} GiB"

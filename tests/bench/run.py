"""Measures ckptkit against what the machine can do: whole processes, side by side.

    python tests/bench/run.py [--only opening] [--size-gib 1] [--dir DIR] [--repeat 5] [--markdown]
        [--converter safetensors/bindings/python/convert.py] [--picklescan PATH]

Makes checkpoints, removes them at the end, and measures what `opening`, `writing`, `identify`, `verifying`,
`checking`, `differing`, `loading`, `sharded`, `fleet` and `remote` describe, as `measure` does it.  No test asserts a
time.  Linux and macOS only.
"""

from __future__ import annotations

import argparse
import compileall
import shutil
import sys
import tempfile
from pathlib import Path

import checking
import differing
import fleet
import identify
import loading
import opening
import remote
import sharded
import verifying
import writing
from measure import ROOT, facts, measure, show, table

COUNTS = (25_000, 50_000, 100_000)
"""Tensors in the files of many tensors."""


def main(arguments: list[str]) -> None:
    """Make the files, measure, print, remove the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = ["opening", "writing", "identify", "verifying", "checking", "differing", "loading", "sharded", "fleet"]
    parts += ["remote"]
    parser.add_argument("--only", choices=parts, help="one part (default: all)")
    parser.add_argument("--size-gib", type=float, default=1.0, help="size of each checkpoint (default: 1)")
    parser.add_argument("--dir", type=Path, help="folder to work in; needs five times the size (default: temporary)")
    parser.add_argument("--converter", type=Path, help="the safetensors project's convert.py, measured beside ours")
    parser.add_argument("--picklescan", type=Path, help="the program of that name, measured beside ours")
    parser.add_argument("--repeat", type=int, default=5, help="counted runs of each command (default: 5)")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    options = parser.parse_args(arguments)
    if options.repeat < 1 or options.size_gib <= 0:
        parser.error("--repeat and --size-gib must be positive")
    nbytes = int(options.size_gib * (1 << 30))
    compileall.compile_dir(ROOT / "ckptkit", quiet=1)  # as an installation does; Python may be told not to
    with tempfile.TemporaryDirectory(prefix="ckptkit-bench-", dir=options.dir) as name:
        folder = Path(name).resolve()
        state, resume = folder / "state_dict.pth", folder / "resume.pth"
        print("making the checkpoints ...", end="", file=sys.stderr, flush=True)
        groups, torch_version = {}, identify.make(folder)
        if options.only not in ("identify", "verifying", "checking", "differing", "loading", "sharded", "fleet"):
            needed = 5.2 * options.size_gib
            if shutil.disk_usage(folder).free < needed * (1 << 30):
                raise SystemExit(f"{folder}: {needed:.1f} GiB are needed; choose another folder with --dir")
            writing.make(nbytes, state, resume)
        if options.only in (None, "opening"):
            opening.make(folder, COUNTS)
            groups.update(opening.groups(resume, COUNTS))
        if options.only in (None, "writing"):
            writing.shard(state)
            groups.update(writing.groups(state, resume, options.converter))
        if options.only in (None, "identify"):
            groups.update(identify.groups(folder))
        if options.only in (None, "verifying"):
            groups.update(verifying.groups(verifying.make(nbytes, folder)))
        if options.only in (None, "checking"):
            groups.update(checking.groups(checking.make(nbytes, folder)))
            groups.update(checking.groups_of_many(*checking.make_many(folder), options.picklescan))
        if options.only in (None, "differing"):
            groups.update(differing.groups(differing.make(nbytes, folder)))
        if options.only in (None, "loading"):
            groups.update(loading.groups(loading.make(nbytes, folder)))
        if options.only in (None, "remote"):
            groups.update(remote.groups(state, folder))
        if options.only in (None, "sharded"):
            groups.update(sharded.groups(sharded.make(nbytes, folder)))
        if options.only in (None, "fleet"):
            groups.update(fleet.groups(fleet.make(folder), options.picklescan))
        print(f"\r{'':100}\r", end="", file=sys.stderr, flush=True)
        for what, fact in facts(folder, torch_version).items():
            print(f"- {what}: {fact}" if options.markdown else f"{what}: {fact}")
        print()
        for title, (baseline, commands) in groups.items():
            rows = list(table(measure(commands, options.repeat), baseline))
            show(f"{title} (median of {options.repeat})", rows, markdown=options.markdown)


if __name__ == "__main__":
    main(sys.argv[1:])

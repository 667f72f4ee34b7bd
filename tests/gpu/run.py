"""What is to be measured and tested where a GPU is at hand: one command, some two minutes.

    python tests/gpu/run.py [--size-gib 1] [--dir DIR] [--device cuda:0]

Loads a file of that size to the device in each way there is, in a process of its own, and prints the first time and the
best of three, and what the host took beyond the start; then runs the tests beside it.  Without a GPU it says so and
ends with 2.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

MAKE = """
import sys, torch
from safetensors.torch import save_file
count = max(1, int(float(sys.argv[1]) * 64))
state = {f"layers.{i}.weight": torch.randn(2048, 2048) for i in range(count)}  # 16 MiB each
torch.save(state, sys.argv[2] + "/model.pth")
save_file(state, sys.argv[2] + "/model.safetensors")
small = {f"layers.{i}.bias": torch.randn(64) for i in range(20000)}
torch.save(small, sys.argv[2] + "/small.pth")
save_file(small, sys.argv[2] + "/small.safetensors")
"""

LOAD = """
import json, sys, time, torch
how, path, device = sys.argv[1:]
torch.zeros(1, device=device)
if how == "ckptkit":
    import ckptkit, ckptkit.torch_bridge
    load = lambda: ckptkit.load_state_dict(path, device=device)
elif how == "torch":
    load = lambda: torch.load(path, map_location=device, weights_only=True)
else:
    from safetensors.torch import load_file
    load = lambda: load_file(path, device=device)
open(path, "rb").read()  # into the page cache
torch.cuda.synchronize()
with open("/proc/self/clear_refs", "w") as clear:
    clear.write("5")  # forget the peak so far
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
before = status("VmRSS:")
times = []
for _ in range(4):
    start = time.perf_counter()
    state = load()
    torch.cuda.synchronize()
    times.append(time.perf_counter() - start)
    assert all(value.device.type == "cuda" for value in state.values())
    total = sum(value.nbytes for value in state.values())
    del state
print(json.dumps({"first": times[0], "best": min(times[1:]), "host": (status("VmHWM:") - before) / 1024,
                  "gbps": total / min(times[1:]) / 1e9}))
"""


def main(arguments: list[str]) -> int:
    """Measure, then test."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size-gib", type=float, default=1.0, help="size of the file (default: 1)")
    parser.add_argument("--dir", type=Path, help="folder to work in (default: temporary)")
    parser.add_argument("--device", default="cuda:0", help="default: cuda:0")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("no GPU is at hand: torch.cuda.is_available() is False; nothing was measured", file=sys.stderr)
        return 2
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name(options.device)}")
    with tempfile.TemporaryDirectory(prefix="ckptkit-gpu-", dir=options.dir) as folder:
        subprocess.run([sys.executable, "-c", MAKE, str(options.size_gib), folder], check=True, env=env)
        print(f"{'':36} first s   best s     GB/s  host MiB")
        for name in ("model.safetensors", "model.pth", "small.safetensors", "small.pth"):
            for how in ("ckptkit", "torch" if name.endswith("pth") else "safetensors"):
                command = [sys.executable, "-c", LOAD, how, f"{folder}/{name}", options.device]
                done = subprocess.run(command, check=True, env=env, capture_output=True, text=True)
                figures = json.loads(done.stdout)
                print(
                    f"{how + ' ' + name:36}{figures['first']:8.3f} {figures['best']:8.3f} {figures['gbps']:8.2f} "
                    f"{figures['host']:9.0f}",
                    flush=True,
                )
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", str(Path(__file__).parent)]
    return subprocess.run(tests, cwd=ROOT, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

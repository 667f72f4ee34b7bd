"""Many threads, an event loop, and files larger than memory: what may go on at once, and what is kept of it."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import pickle
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.files import deflated_copy

import ckptkit
from ckptkit import formats

Save = Callable[..., Path]

THREADS = 8


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """What is made by as many threads that begin together."""
    start = threading.Barrier(THREADS)

    def begin(number: int) -> Any:
        start.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {f"w{number}": torch.randn(300, 40 + number) for number in range(24)}
    return {**made, "t": torch.randn(200, 300).t(), "i": torch.arange(100_000)}


def test_entries_of_one_open_file(save: Save, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    plain = save(state)
    for path in (plain, deflated_copy(plain, tmp_path / "deflated.pth")):
        with ckptkit.open(path) as file:
            cast = file.rewrite(ckptkit.CastDtype("float16"))

            def read(number: int, file: Any = file, cast: Any = cast) -> None:
                names = [*state][number % 5 :] + [*state][: number % 5]
                for name in names:
                    tensor = state[name]
                    assert np.array_equal(file.state_dict[name].numpy(), tensor.numpy())
                    assert torch.equal(file.state_dict[name][3:7].torch(), tensor[3:7])
                    expected = tensor.half() if tensor.is_floating_point() else tensor
                    assert torch.equal(cast.state_dict[name].torch(), expected)

            at_once(read)


def test_one_open_file_is_loaded_rewritten_and_saved(
    save: Save, tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    with ckptkit.open(deflated_copy(save(state), tmp_path / "deflated.pth")) as file:

        def work(number: int) -> None:
            renamed = file.rewrite(ckptkit.AddPrefix(f"p{number}"))
            if number % 2:
                loaded = renamed.load()
            else:
                target = tmp_path / f"{number}.safetensors"
                renamed.save(target)
                loaded = load_file(target)
            assert all(torch.equal(loaded[f"p{number}.{name}"], tensor) for name, tensor in state.items())

        at_once(work)
    assert len([*tmp_path.iterdir()]) == 2 + THREADS // 2  # no temporary file is left


def test_conversions_of_one_source(save: Save, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = save(state)

    def convert(number: int) -> bytes:
        target = tmp_path / f"{number}.safetensors"
        ckptkit.convert(path, target, dtype="bfloat16")
        return target.read_bytes()

    assert len(set(at_once(convert))) == 1
    single = tmp_path / "one.safetensors"

    def same_target(number: int) -> None:
        ckptkit.convert(path, single, force=True, add_prefix=f"p{number}")

    at_once(same_target)
    (prefix,) = {name.partition(".")[0] for name in load_file(single)}  # one of them, whole
    assert prefix in {f"p{number}" for number in range(THREADS)}


def test_other_functions_at_once(save: Save, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = save(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "a.safetensors")
    documents = at_once(lambda _: json.dumps(ckptkit.inspect(path)))
    assert len(set(documents)) == 1
    assert all(difference.equal for difference in at_once(lambda _: ckptkit.diff(path, tmp_path / "a.safetensors")))
    assert all(report.ok for report in at_once(lambda _: ckptkit.check(path)))

    def saved(number: int) -> bytes:
        ckptkit.save(state, tmp_path / f"{number}.pth")
        return (tmp_path / f"{number}.pth").read_bytes()

    assert len(set(at_once(saved))) == 1


def test_an_event_loop_stays_responsive(save: Save, tmp_path: Path) -> None:
    weights = (torch.randn(8 << 20) * 8).round()  # takes a while to inflate
    path = deflated_copy(save({"w": weights}), tmp_path / "deflated.pth")

    async def serve() -> tuple[dict[str, torch.Tensor], int, float]:
        loading = asyncio.ensure_future(asyncio.to_thread(ckptkit.load_state_dict, path, map_location="cpu"))
        ticks, begun = 0, time.monotonic()
        while not loading.done():
            await asyncio.sleep(0.001)
            ticks += 1
        return await loading, ticks, time.monotonic() - begun

    state, ticks, seconds = asyncio.run(serve())
    assert state["w"].shape == (8 << 20,)
    assert ticks > 10 * min(seconds, 1)


def test_an_open_file_stays_in_its_process(save: Save) -> None:
    with ckptkit.open(save({"w": torch.ones(2)})) as file:
        for hand_on in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=r"model\.pth: an open checkpoint cannot be copied or pickled; open it"):
                hand_on(file)
            with pytest.raises(TypeError, match=r"model\.pth: an open file cannot be copied or pickled; open it again"):
                hand_on(file.state_dict["w"].storage.source.file)
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            pickle.dumps(file.state_dict["w"])


@pytest.mark.filterwarnings("default")
def test_a_file_larger_than_memory_is_gone_through_in_little(tmp_path: Path) -> None:
    """Half a GiB of tensors, holes all but their first values, one by one in one and a half times what one takes."""
    count, nbytes = 32, 16 << 20
    header = json.dumps(
        {
            f"w{n:03}": {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [n * nbytes, (n + 1) * nbytes]}
            for n in range(count)
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        for number in range(count):
            out.seek(8 + len(header) + number * nbytes)
            out.write(struct.pack("<f", number))
        out.truncate(8 + len(header) + count * nbytes)
    code = f"""
import resource, ckptkit
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with ckptkit.open({str(path)!r}) as file:
    for number, (name, entry) in enumerate(file.state_dict.items()):
        if number == 2: before = peak()
        array = entry.numpy()
        assert array[0] == number and array.size == {nbytes // 4}, name
        del array
    assert [float(entry[0].numpy()) for entry in file.state_dict.values()] == [*range({count})]
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 24 << 10  # KiB: a tensor is 16 MiB


def test_compressed_tensors_are_gone_through_in_little(tmp_path: Path) -> None:
    """What is inflated goes to the disk, and no more than one tensor of it to memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({f"w{number}": torch.full((4 << 20,), float(number)) for number in range(5)}, tmp_path / "big.pth")
    path = deflated_copy(tmp_path / "big.pth", tmp_path / "deflated.pth")
    (tmp_path / "big.pth").unlink()
    code = f"""
import resource, ckptkit
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with ckptkit.open({str(path)!r}) as file:
    for number, entry in enumerate(file.state_dict.values()):
        if number == 2: before = peak()
        assert entry.numpy()[-1] == number
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 24 << 10


def test_the_collector_is_as_it_was_once_all_are_done() -> None:
    assert gc.isenabled()
    first, second = formats.collector_paused(), formats.collector_paused()
    with first:
        second.__enter__()
    assert not gc.isenabled()  # another reads on
    second.__exit__(None, None, None)
    assert gc.isenabled()

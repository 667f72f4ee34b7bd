"""Tensors in pieces: every cut of a tensor into boxes gives its bytes again, whatever range of them is asked for."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence

import pytest
import torch

from ckptkit.checkpoint import Replica, Storage, TensorEntry
from ckptkit.computed import Held
from ckptkit.errors import CorruptError, LimitError
from ckptkit.transfer import pieces as module
from ckptkit.transfer.pieces import Piece, pieced
from ckptkit.transfer.replicas import require_equal
from ckptkit.transfer.values import stream

DTYPES = (torch.uint8, torch.int16, torch.float32, torch.float64, torch.complex128)
SHAPES = ((), (1,), (7,), (3, 4), (5, 1), (2, 3, 4), (4, 1, 3), (2, 2, 2, 3))


def record(tensor: torch.Tensor) -> TensorEntry:
    data = bytes(tensor.untyped_storage())
    storage = Storage(key="0", dtype=None, nbytes=len(data), location="cpu", source=Held(data, "memory").whole)
    return TensorEntry(
        storage=storage,
        storage_offset=int(tensor.storage_offset()),
        shape=tuple(tensor.shape),
        stride=tensor.stride(),
        dtype=str(tensor.dtype).removeprefix("torch."),
    )


def cut(tensor: torch.Tensor, rng: random.Random) -> list[Piece]:
    """The tensor as boxes between random cuts of each dimension; some of them transposed, some read late."""
    cuts = [sorted({0, n, *rng.sample(range(n), rng.randint(0, min(3, n - 1)))}) for n in tensor.shape]
    pieces = []
    for index in itertools.product(*[range(len(c) - 1) for c in cuts]):
        offsets = tuple(c[i] for c, i in zip(cuts, index, strict=True))
        sizes = tuple(c[i + 1] - c[i] for c, i in zip(cuts, index, strict=True))
        local = tensor[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))].clone()
        if tensor.dim() > 1 and rng.random() < 0.5:
            local = local.transpose(0, 1).contiguous().transpose(0, 1)
        entry = record(local)
        pieces.append(Piece(offsets, sizes, entry if rng.random() < 0.5 else lambda entry=entry: entry))
    rng.shuffle(pieces)
    return pieces


def cases() -> Iterator[tuple[int, torch.Tensor, list[Piece]]]:
    for seed in range(120):
        rng = random.Random(seed)
        shape = rng.choice(SHAPES)
        tensor = torch.arange(math.prod(shape)).reshape(shape).to(rng.choice(DTYPES))
        yield seed, tensor, cut(tensor, rng)


def dtype_of(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def test_every_cut_gives_the_tensors_bytes_in_every_range() -> None:
    for seed, tensor, parts in cases():
        rng, want = random.Random(seed), bytes(tensor.contiguous().untyped_storage())
        entry = pieced("w", tuple(tensor.shape), dtype_of(tensor), parts, files=())
        assert b"".join(stream(entry)) == want
        source = entry.storage.source
        for _ in range(10):
            start = rng.randint(0, len(want))
            stop = rng.randint(start, len(want))
            assert source.read(start, stop - start) == want[start:stop]
            assert source.part(start, stop - start).read() == want[start:stop]


def test_runs_that_are_copied_are_the_bytes_of_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COPIED_NBYTES", 1)
    copied = 0
    for seed, tensor, parts in cases():
        want = bytes(tensor.contiguous().untyped_storage())
        source = pieced("w", tuple(tensor.shape), dtype_of(tensor), parts, files=()).storage.source
        rng = random.Random(seed)
        start = rng.randint(0, len(want))
        stop = rng.randint(start, len(want))
        runs = source.whole.copies(start, stop - start)  # type: ignore[union-attr]
        if runs is not None:
            copied += 1
            assert b"".join(run.read() for _, run in runs) == want[start:stop]
            assert [at for at, _ in runs] == list(itertools.accumulate([0, *(run.nbytes for _, run in runs)]))[:-1]
    assert copied > 20


def test_runs_that_are_short_are_gathered() -> None:
    tensor = torch.arange(64.0).reshape(8, 8)
    halves = [Piece((0, 4 * i), (8, 4), record(tensor[:, 4 * i : 4 * i + 4].clone())) for i in range(2)]
    source = pieced("w", (8, 8), "float32", halves).storage.source
    assert source.whole.copies(0, source.nbytes) is None  # type: ignore[union-attr]


def test_another_view_of_flat_pieces() -> None:
    tensor = torch.arange(12.0)
    entry = pieced("w", (12,), "float32", [Piece((0,), (12,), record(tensor))], view=(3, 4))
    assert entry.shape == (3, 4)
    assert entry.numpy().tolist() == tensor.reshape(3, 4).tolist()
    with pytest.raises(CorruptError, match="a different number of elements"):
        pieced("w", (12,), "float32", [Piece((0,), (12,), record(tensor))], view=(3, 5))


ROW = record(torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([(0, 0)], "leave out 8 elements of 16"),
        ([], "leave out 16 elements of 16"),
        ([(0, 0), (1, 0)], r"at \[0, 0\] of sizes \[2, 4\] and at \[1, 0\] of sizes \[2, 4\] overlap"),
        ([(0, 0), (2, 0), (2, 0)], "overlap"),
        ([(0, 0), (3, 0)], "reaches outside"),
        ([(0, 0), (-1, 0)], "reaches outside"),
        ([(0, 0), (2,)], "a different number of dimensions"),
    ],
)
def test_boxes_that_do_not_make_the_whole(places: Sequence[tuple[int, ...]], message: str) -> None:
    with pytest.raises(CorruptError, match=message):
        pieced("w", (4, 4), "float32", [Piece(place, (2, 4), ROW) for place in places], files=())


def test_a_piece_of_other_sizes_or_another_dtype_is_told() -> None:
    with pytest.raises(CorruptError, match=r"in rank 1 at \[0, 0\] is float32 \[2, 4\], not float32 \[4, 4\]"):
        pieced("w", (4, 4), "float32", [Piece((0, 0), (4, 4), ROW, "rank 1")])
    late = pieced("w", (2, 4), "float16", [Piece((0, 0), (2, 4), lambda: ROW)], files=())
    with pytest.raises(CorruptError, match="is float32"):
        late.storage.source.read()


def test_pinwheels_are_told_apart_and_many_tangled_boxes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # No cut goes all the way through: every dimension has boxes that straddle it.
    boxes = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    tensor = torch.arange(9.0).reshape(3, 3)
    parts = [Piece(o, s, record(tensor[o[0] : o[0] + s[0], o[1] : o[1] + s[1]].clone())) for o, s in boxes]
    assert pieced("w", (3, 3), "float32", parts).numpy().tolist() == tensor.tolist()
    monkeypatch.setattr(module, "_MOST_PAIRS", 9)
    with pytest.raises(LimitError, match="pairs of pieces"):
        pieced("w", (3, 3), "float32", parts)


def test_100_000_pieces_are_told_apart_in_a_moment() -> None:
    boxes = [((i, 250 * j), (1, 250)) for i in range(25_000) for j in range(4)]
    module.require_cover("w", (25_000, 1_000), boxes)
    with pytest.raises(CorruptError, match="overlap"):
        module.require_cover("w", (25_000, 1_000), [*boxes, boxes[17]])


def test_replicas_must_be_the_same_or_what_a_cast_makes_of_the_other() -> None:
    torch.manual_seed(0)
    master = torch.randn(50, 40)
    low = master.to(torch.bfloat16)
    require_equal([Replica("w", record(master), record(master.clone()), "rank 0 and rank 1")])
    require_equal([Replica("w", record(master), record(low), "module and master")])
    low[3, 4] += 1
    with pytest.raises(CorruptError, match=r"1 tensor .*: w \(module and master\)") as caught:
        require_equal([Replica("w", record(master), record(low), "module and master")])
    assert caught.value.names == ("w (module and master)",)
    with pytest.raises(CorruptError, match=r"b .*rank 2"):
        require_equal([Replica("a", ROW, ROW, "rank 1"), Replica("b", ROW, record(torch.zeros(4, 2)), "rank 2")])

"""What every reader must do: a test class that the tests of each container subclass.

    class TestLegacy(Conformance):
        reads = "torch-legacy"

        def written(self, state, folder):
            path = folder / "m.pth"
            torch.save(state, path, _use_new_zipfile_serialization=False)
            return path

The oracle is the state_dict that was written, and for what is converted torch and the safetensors
library.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

import ckptkit
from ckptkit.errors import FileAccessError, FormatError
from support.files import tensor_of
from support.repeated import repeated

SameBits = Callable[[torch.Tensor, torch.Tensor], bool]


class Conformance:
    """Subclass it in the tests of a container."""

    reads: ClassVar[str]
    """The container's name."""

    keeps_order: ClassVar[bool] = True
    """Whether names come in the order in which they were written."""

    trust: ClassVar[str] = "safe"
    """What is said of the names that it needs."""

    step: ClassVar[int] = 1
    """Every how many bytes a file is cut off."""

    def written(self, state: dict[str, torch.Tensor], folder: Path) -> Path:
        """A file of this container that holds the state_dict, written by the reference implementation."""
        raise NotImplementedError

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors that this container can hold."""
        torch.manual_seed(0)
        return {
            "z.weight": torch.randn(3, 4),
            "a.bias": torch.randn(3).double(),
            "half": torch.randn(2, 2).half(),
            "brain": torch.randn(5).bfloat16(),
            "count": torch.tensor(7),
            "mask": torch.tensor([True, False, True]),
            "bytes": torch.arange(9, dtype=torch.uint8),
            "empty": torch.zeros(0, 3),
            "odd name: é/'\n": torch.ones(1),
        }

    def damage(self, path: Path) -> Path:
        """The file that is damaged in the tests below: the one that says what there is."""
        return path

    def test_names_shapes_and_values(self, tmp_path: Path, same_bits: SameBits) -> None:
        state = self.state()
        with ckptkit.open(self.written(state, tmp_path)) as file:
            found = file.state_dict
            assert (file.format, file.kind, file.trust) == (self.reads, "state_dict", self.trust)
            assert set(found) == set(state)
            assert list(found) == list(state) or not self.keeps_order
            for name, value in state.items():
                assert found[name].shape == tuple(value.shape)
                assert found[name].location == "cpu"
                assert same_bits(tensor_of(found[name]), value), name

    def test_it_opens_as_torch_tensors(self, tmp_path: Path, same_bits: SameBits) -> None:
        state = self.state()
        found = ckptkit.load_state_dict(self.written(state, tmp_path))
        assert all(same_bits(found[name], value) for name, value in state.items())

    @pytest.mark.parametrize("ending", ["pth", "safetensors"])
    def test_it_converts_to_what_others_read(self, tmp_path: Path, same_bits: SameBits, ending: str) -> None:
        """torch, and the safetensors library."""
        state = self.state()
        target = tmp_path / f"converted.{ending}"
        report = ckptkit.convert(self.written(state, tmp_path), target)
        assert report.details["checked"]
        found = torch.load(target, weights_only=True) if ending == "pth" else load_file(target)
        assert set(found) == set(state)
        assert all(same_bits(found[name], value) for name, value in state.items())

    @repeated("every", 3, 1)
    def test_cut_off_anywhere_it_is_a_format_error(self, tmp_path: Path, every: int) -> None:
        path = self.written({"a": torch.arange(3.0), "b": torch.arange(2)}, tmp_path)
        cut = self.damage(path)
        data = cut.read_bytes()
        for length in (0, *range(len(data) - 1, 0, -self.step * every)):
            cut.write_bytes(data[:length])
            with pytest.raises(FormatError) as caught:
                ckptkit.open(path)
            assert len(str(caught.value)) < 2000

    @repeated("times", 150, 500)
    def test_with_flipped_bits_it_opens_or_is_a_format_error(self, tmp_path: Path, times: int) -> None:
        path = self.written({"a": torch.arange(3.0), "b": torch.arange(2)}, tmp_path)
        changed = self.damage(path)
        data, numbers = changed.read_bytes(), random.Random(0)
        refused = 0
        for _ in range(times):
            at = numbers.randrange(len(data))
            changed.write_bytes(data[:at] + bytes([data[at] ^ 1 << numbers.randrange(8)]) + data[at + 1 :])
            try:
                with ckptkit.open(path) as file:
                    for entry in file.state_dict.values():
                        assert entry.span()[1] <= entry.storage.nbytes
            except (FormatError, FileAccessError):
                refused += 1
        assert refused > 10

"""The checkpoints of several ranks that tests read: torch reads of them what they are said to hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.files import SameBits
from support.sharded import Samples, flat


def as_torch_reads(folder: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner()
    _load_state_dict(state, storage_reader=dcp.FileSystemReader(folder), planner=planner, no_dist=True)
    return state


def same(left: dict[str, Any], right: dict[str, Any], same_bits: SameBits) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        both = isinstance(value, torch.Tensor) and isinstance(right[name], torch.Tensor)
        assert same_bits(value, right[name]) if both else value == right[name], name


def test_torch_reads_what_was_to_be_saved(sharded: Samples, same_bits: SameBits) -> None:
    read = 0
    for case, sample in sharded.items():
        if not (sample.folder / ".metadata").exists():
            continue
        whole = dict(flat(sample.expected))
        if case == "no_flatten":  # they are in the file; torch's planner for reading it flattens, and loses them
            whole = {name: value for name, value in whole.items() if not isinstance(value, dict)}
        same(dict(flat(as_torch_reads(sample.folder))), whole, same_bits)
        read += 1
        assert len(sample.tensors) > 3, case
    assert read >= 16


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_the_sharded_safetensors(sharded: Samples, same_bits: SameBits) -> None:
    for case in ("hf_sharded_2", "hf_sharded_4", "hf_several_files"):
        sample = sharded[case]
        state = {name: torch.zeros_like(value) for name, value in sample.tensors.items()}
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(sample.folder)), no_dist=True)
        same(state, sample.tensors, same_bits)

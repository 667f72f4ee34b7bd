"""The comparison of values that are in several files and must be the same.

A value of which each rank has a copy is read from one file and compared with the others; a value stored at two
precisions, such as DeepSpeed's weights and their fp32 masters, is converted to the lesser one and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from ckptkit.casting import cast_storage
from ckptkit.checkpoint import Replica
from ckptkit.errors import CorruptError
from ckptkit.report import count_of, listed
from ckptkit.transfer.values import same_values
from ckptkit.transfer.workers import in_parallel

__all__ = ["require_equal"]

_LISTED = 5
"""Tensors that a message lists."""


def require_equal(replicas: Sequence[Replica]) -> None:
    """Compare each pair bit for bit, the first of another dtype converted to that of the second.

    Raises:
        CorruptError: some differ; the message lists them, each with the ranks.
        DTypeError: one cannot be converted.
    """
    differing: dict[int, str] = {}

    def compare(number: int, replica: Replica) -> None:
        if not _is_equal(replica):
            differing[number] = f"{replica.name} ({replica.where})"

    tasks: list[Callable[[], object]] = [partial(compare, number, replica) for number, replica in enumerate(replicas)]
    in_parallel(tasks, nbytes=sum(replica.value.nbytes for replica in replicas))
    if differing:
        names = [differing[number] for number in sorted(differing)]
        raise CorruptError(
            f"{count_of(len(names), 'tensor')} with different values in two files, although each should be a copy: "
            f"{listed(names, _LISTED)}; files of different runs or steps were mixed, or one is damaged",
            names=names,
        )


def _is_equal(replica: Replica) -> bool:
    value, copy = replica.value, replica.copy
    if value.shape != copy.shape:
        return False
    if value.dtype != copy.dtype:
        value = replace(value, storage=cast_storage(value.storage, value.dtype, copy.dtype), dtype=copy.dtype)
    return same_values(value, copy)

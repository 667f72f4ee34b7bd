"""Sharded output: how names are shared out among files, and the index over them.

What is written is what `ckptkit.formats.sharded` reads and ``huggingface_hub`` writes
(``serialization/_torch.py`` ``save_torch_state_dict``, ``serialization/_base.py``
``split_state_dict_into_shards_factory``): shards ``model-00001-of-00003.safetensors``, and beside
them ``model.safetensors.index.json`` with the ``weight_map`` and the ``total_size`` of all tensors
in bytes, tied ones once.  As there, nothing is sharded that fits into one file.

Names are taken in state_dict order; a shard is closed when the next tensor would make its *file*
larger than wanted, header, pickle and archive included.  What must lie in one file goes there with
its first name:

- safetensors: tied tensors, which are stored once.  Views of one storage are written out apart.  The index
  lists the name that a tensor is stored under, and no other: loaders look for what it lists.
- torch: all that lies over one storage or shares an object, because sharing ends with a file.

Only where that alone is larger than wanted is a file larger than wanted: it holds no other tensor.
(So does the first if what it has beside tensors, below, takes more.)

The first shard has the versions of all modules, each other one those of its own modules; other attributes
of the mapping stand in the first torch shard alone.  The checkpoint's string metadata stands in each
shard and in the index.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from ckptkit.checkpoint import STATE_DICT, Checkpoint
from ckptkit.errors import RewriteError
from ckptkit.formats.format import Format
from ckptkit.formats.holdable import require_holdable
from ckptkit.formats.safetensors_header import NAME
from ckptkit.formats.shards.names import is_shard_name
from ckptkit.formats.shards.units import SafetensorsUnits, TorchUnits
from ckptkit.formats.tied_order import ORDER, places
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.plan import Index, Literal, Plan
from ckptkit.report import count_of

__all__ = ["index_name", "plan_shards"]


def index_name(name: str) -> str:
    """The customary name of the index of a checkpoint that would be ``name`` if it were one file."""
    return name + ".index.json"


def plan_shards(checkpoint: Checkpoint, container: Format, name: str, most: int) -> Plan:
    """The plan of files of at most ``most`` bytes.

    Args:
        checkpoint: what to write.
        container: of the shards; its ``write`` plans one file.
        name: what the checkpoint would be called if it were one file; shards are named after it.
        most: bytes of a file; more only where what must stay together has more.

    Returns:
        The container's own plan where one file is enough; else that of an index, which belongs
        under `index_name`, with those of the shards.

    Raises:
        RewriteError: there is training state that no shard can hold, no tensor at all, more shards than
            `Limits.shards`, or a name that no index can hold; or as the container's ``write``.
        LimitError, UnsupportedError: as the container's ``write``.
    """
    stem, ending = _stem_and_ending(name, container)
    whole = container.write(checkpoint)
    if whole.nbytes <= most:
        return whole
    require_holdable(checkpoint, "a sharded checkpoint", plain=False)
    units = SafetensorsUnits(checkpoint) if container.name == NAME else TorchUnits(checkpoint)
    parts = units.shared_out(most)
    if len(parts) < 2:
        return whole
    if len(parts) > DEFAULT_LIMITS.shards:
        enough = most
        while len(units.shared_out(enough)) > DEFAULT_LIMITS.shards:
            enough *= 2
        raise RewriteError(
            f"files of at most {most:,} bytes would be {count_of(len(parts), 'shard')}, and readers take at most "
            f"{DEFAULT_LIMITS.shards:,}; {enough:,} bytes a file are enough"
        )
    del whole
    shards: dict[str, Plan] = {}
    holder: dict[str, str] = {}
    for number, names in enumerate(parts):
        shard = f"{stem}-{number + 1:05d}-of-{len(parts):05d}{ending}"
        part = checkpoint.replace(state_dict=units.part(names, first=number == 0), rest=STATE_DICT)
        shards[shard] = container.write(part)
        holder.update(dict.fromkeys(names, shard))
    return _index_plan(checkpoint, container, shards, {key: holder[key] for key in checkpoint.state_dict.everything})


def _index_plan(
    checkpoint: Checkpoint, container: Format, shards: Mapping[str, Plan], weight_map: Mapping[str, str]
) -> Plan:
    total = sum({entry.view: entry.nbytes for entry in checkpoint.state_dict.values()}.values())
    metadata: dict[str, object] = {**checkpoint.metadata, "total_size": total}
    metadata.pop("format", None)  # that is the shards'
    aliases = {alias: kept for plan in shards.values() for alias, kept in plan.aliases.items()}
    stored = {name: shard for name, shard in weight_map.items() if name not in aliases}
    found = [alias for shard in dict.fromkeys(stored.values()) for alias in shards[shard].aliases]
    if ORDER not in metadata and (order := places(weight_map, found)) is not None:
        metadata[ORDER] = order
    index = Index(weight_map=stored, metadata=metadata)
    data = index.to_bytes()
    try:
        str(data, "utf-8")
    except UnicodeDecodeError:
        raise RewriteError("a name that is not valid Unicode cannot stand in an index of shards") from None
    if len(data) > DEFAULT_LIMITS.index_nbytes:
        raise RewriteError(
            f"the index of {count_of(len(weight_map), 'name')} would have {len(data):,} bytes, and readers take at "
            f"most {DEFAULT_LIMITS.index_nbytes:,}; write one file"
        )
    return Plan(
        format="safetensors-sharded" if container.name == NAME else "torch-sharded",
        nbytes=len(data),
        steps=(Literal(0, data),),
        tensors=sum(plan.tensors for plan in shards.values()),
        aliases=aliases,
        shards=shards,
        index=index,
    )


def _stem_and_ending(name: str, container: Format) -> tuple[str, str]:
    """The parts of a shard's name before and after its number.

    Raises:
        RewriteError: readers of the index would not take files of that name, or for those of another container.
    """
    stem, ending = os.path.splitext(name)
    if not is_shard_name(name):
        raise RewriteError(f"{name!r}: an index cannot name shards so; choose a destination without backslash or colon")
    if (ending.lower() == ".safetensors") != (container.name == NAME):
        endings = ", ".join(container.suffixes)
        raise RewriteError(
            f"{name}: shards are taken for safetensors by that ending alone; of {container.name} files it must be "
            f"one of {endings}"
        )
    return stem, ending.lower()

"""A tensor's pickle in one step: what nine tenths of a checkpoint's opcodes spell, matched as one pattern.

``torch.save`` writes every tensor but the first few with the same forty opcodes (pickle protocol 2), after
the name ``torch._utils._rebuild_tensor_v2`` was pushed::

    MARK MARK GET storage GET class KEY GET location NUMEL [NONE] TUPLE PUT BINPERSID
    OFFSET SIZE PUT STRIDE PUT NEWFALSE GET OrderedDict EMPTY_TUPLE REDUCE PUT TUPLE PUT REDUCE PUT

`TensorShortcut` recognizes exactly that and makes the same `TensorEntry` that the opcodes one by one
make, at a third of the time and memory: the arguments, which nothing refers to, are not kept.  What
differs in anything is left to the opcodes; so is a pickle that does refer to them, from its beginning
(`ckptkit.pickling.reader`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from struct import Struct
from typing import Final

from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.pickling.inert import Global, is_global

__all__ = ["REBUILD", "TensorShortcut"]

REBUILD = ("torch._utils", "_rebuild_tensor_v2")
"""The name whose call is recognized."""

_GET = rb"h.|j...."
_INT = rb"K.|M..|J....|\x8a\x05.....|\x8a\x06......"
_PUT = rb"[qr]"
_SIZE = rb"\)|(?:%(int)s)[\x85]|(?:(?:%(int)s)){2}\x86|(?:(?:%(int)s)){3}\x87|\((?:(?:%(int)s)){4,6}t" % {b"int": _INT}
_TENSOR = re.compile(
    rb"\(\(((?:%(get)s)(?:%(get)s))"  # 1: "storage" and the class
    rb"(?:X(.)\0\0\0([0-9]{1,18})r(....)|(%(get)s))"  # 2-4: length of the key, the key, its memo index; 5: the key
    rb"(%(get)s)(%(int)s)N?tr(....)Q"  # 6-8: location, number of elements
    rb"(%(int)s)(%(size)s)(?:(?<!\))r(....)|(?<=\)))"  # 9-11: offset, size
    rb"(%(size)s)(?:(?<!\))r(....)|(?<=\)))"  # 12-13: stride
    rb"([\x88\x89])(%(get)s)\)Rr(....)tr(....)Rr(....)"  # 14-18: requires_grad, OrderedDict
    % {b"get": _GET, b"int": _INT, b"size": _SIZE},
    re.DOTALL,
).match

"""The source in a TorchScript archive: what it says of classes, and nothing else.

``torch/csrc/jit/serialization/python_print.cpp`` writes each class of a module so::

    class Linear(Module):
      __parameters__ = ["weight", "bias", ]
      __buffers__ = []
      weight : Tensor
      in_features : Final[int] = 3
      def forward(self: __torch__.torch.nn.modules.linear.Linear, ...

Classes with another base, or none, are no modules.  Lines are looked at, never run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ckptkit.errors import LimitError
from ckptkit.formats.torch_archive import TorchArchive
from ckptkit.pickling.inert import Global, InertDict, Object

__all__ = ["ScriptClass", "ScriptClasses", "parse_classes"]

_CODE_NBYTES = 64 << 20
"""Bytes of source that is looked through; a model of 5,000 modules has about two million."""

_CLASS = re.compile(r"^class ([^\s():]+)(?:\((\w+)\))?:$", re.MULTILINE)
_LISTS = re.compile(r"^  __(parameters|buffers)__ = \[(.*)\]$", re.MULTILINE)
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_FINAL = re.compile(r"^  (\w+) : Final\[[^\]\n]{1,60}\] = (.{1,200})$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ScriptClass:
    """A module's class, as its source tells it.

    Attributes:
        parameters, buffers: names of the attributes that are.
        constants: name and value of what stands in the source itself.
    """

    parameters: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()
    constants: list[tuple[object, object]] = field(default_factory=list)


class ScriptClasses:
    """What the source in an archive says of its classes; each file is read when it is first asked for.

    Args:
        archive: the archive.
        folder: of the source, with its slash.

    Attributes:
        limit: the most characters that the paths of a program's modules may have together.
        missing: how many modules had no source.
    """

    def __init__(self, archive: TorchArchive, folder: str = "code/") -> None:
        self._archive = archive
        self._folder = folder
        self._files: dict[str, dict[str, ScriptClass | None] | None] = {}
        self._left = _CODE_NBYTES
        self.limit = archive.limits.pickle_nbytes
        self.missing = 0

    def is_module(self, node: object) -> bool:
        """Whether a node is an object of a module's class."""
        if not isinstance(node, Object) or not isinstance(node.cls, Global) or not isinstance(node.state, InertDict):
            return False
        if "_script_class" in node.state:
            return True
        if not node.cls.module.startswith("__torch__"):
            return False
        listed = self._file(node.cls.module)
        return "training" in node.state if listed is None else listed.get(node.cls.name) is not None

    def of(self, cls: Global) -> ScriptClass | None:
        """A module's class; ``None``: its source is not there."""
        listed = self._file(cls.module)
        return None if listed is None else listed.get(cls.name)

    def _file(self, module: str) -> dict[str, ScriptClass | None] | None:
        """The classes in one file, by name (``None``: no module's); ``None``: there is no such file."""
        if module not in self._files:
            name = f"{self._folder}{module.replace('.', '/')}.py"
            record = self._archive.records.get(name)
            if record is None:
                self._files[module] = None
            else:
                self._left -= record.nbytes
                if self._left < 0:
                    raise LimitError(
                        "bytes of a program's source", limit=_CODE_NBYTES, actual=_CODE_NBYTES - self._left
                    )
                self._files[module] = dict(parse_classes(self._archive.read(name).decode("utf-8", "replace")))
        return self._files[module]


def parse_classes(text: str) -> Iterator[tuple[str, ScriptClass | None]]:
    """The classes in a source text, by name; ``None``: one that is no module's."""
    starts = list(_CLASS.finditer(text))
    ends = [match.start() for match in starts[1:]] + [len(text)]
    for match, end in zip(starts, ends, strict=True):
        name, base = match.groups()
        if base != "Module":
            yield name, None
            continue
        lists = {kind: _strings(items) for kind, items in _LISTS.findall(text, match.end(), end)}
        constants = [(name, _literal(value)) for name, value in _FINAL.findall(text, match.end(), end)]
        yield name, ScriptClass(lists.get("parameters", frozenset()), lists.get("buffers", frozenset()), constants)


def _strings(items: str) -> frozenset[str]:
    """The strings in a list, as ``printQuotedString`` (``c10/util/StringUtil.h``) writes them."""
    return frozenset(str(_literal(f'"{item}"')) if "\\" in item else item for item in _STRING.findall(items))


def _literal(text: str) -> object:
    """The number, string or tuple that a text stands for; the text itself where it is something else."""
    import ast

    try:
        value: object = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, (bool, int, float, str, tuple, type(None))) else text

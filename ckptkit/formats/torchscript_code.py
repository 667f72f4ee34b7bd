"""The source in a TorchScript archive: its facts about classes, and nothing else.

``torch/csrc/jit/serialization/python_print.cpp`` writes each class of a module so::

    class Linear(Module):
      __parameters__ = ["weight", "bias", ]
      __buffers__ = []
      weight : Tensor
      in_features : Final[int] = 3
      def forward(self: __torch__.torch.nn.modules.linear.Linear, ...

Classes with another base, or none, are not modules.  Lines are matched, never run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import field

from ckptkit.errors import LimitError
from ckptkit.formats.torch_archive import TorchArchive
from ckptkit.pickling.inert import Global, InertDict, Object
from ckptkit.startup import dataclass

__all__ = ["ScriptClass", "ScriptClasses", "parse_classes"]

_CLASS = re.compile(r"^class ([^\s():]+)(?:\((\w+)\))?:$", re.MULTILINE)
_LISTS = re.compile(r"^  __(parameters|buffers)__ = \[(.*)\]$", re.MULTILINE)
_ITEM = re.compile(r'"((?:[^"\\]|\\.)*)"(?:, )?')
_ESCAPE = re.compile(rb"\\([0-7]{3}|.)", re.DOTALL)
_ESCAPED = {b"a": b"\a", b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}
_FINAL = re.compile(r"^  (\w+) : Final\[[^=\n]{1,60}\] = (.{1,200})$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ScriptClass:
    """A module's class, according to its source.

    Attributes:
        parameters, buffers: names of the attributes that are.
        constants: name and value of what is in the source itself.
    """

    parameters: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()
    constants: list[tuple[object, object]] = field(default_factory=list)


class ScriptClasses:
    """The facts about classes in an archive's source; each file is read on first use.

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
        self._limits = archive.limits
        self._left = self._limits.source_nbytes
        self._count = 0
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
                    most = self._limits.source_nbytes
                    raise LimitError("bytes of a program's source", limit=most, actual=most - self._left)
                self._files[module] = self._counted(parse_classes(self._archive.read(name).decode("utf-8", "replace")))
        return self._files[module]

    def _counted(self, classes: Iterator[tuple[str, ScriptClass | None]]) -> dict[str, ScriptClass | None]:
        found: dict[str, ScriptClass | None] = {}
        for name, source in classes:
            self._count += 1
            if self._count > self._limits.source_classes:
                most = self._limits.source_classes
                raise LimitError("classes in a program's source", limit=most, actual=self._count)
            found[name] = source
        return found


def parse_classes(text: str) -> Iterator[tuple[str, ScriptClass | None]]:
    """The classes in a source text, by name; ``None``: one that is not a module's."""
    match = _CLASS.search(text)
    while match is not None:
        following = _CLASS.search(text, match.end())
        start, end = match.end(), len(text) if following is None else following.start()
        if match[2] == "Module":
            lists = {kind: _strings(items) for kind, items in _LISTS.findall(text, start, end)}
            constants: list[tuple[object, object]] = [
                (name, _literal(value)) for name, value in _FINAL.findall(text, start, end)
            ]
            yield match[1], ScriptClass(lists.get("parameters", _NONE), lists.get("buffers", _NONE), constants)
        else:
            yield match[1], None
        match = following


_NONE: frozenset[str] = frozenset()


def _strings(items: str) -> frozenset[str]:
    """The strings in a list, which must be consecutive: everything after anything else is left out."""
    found = set()
    match = _ITEM.match(items)
    while match is not None:
        found.add(_unescaped(match[1]))
        match = _ITEM.match(items, match.end())
    return frozenset(found)


def _unescaped(text: str) -> str:
    """A string as ``printQuotedString`` (``c10/util/StringUtil.h``) escapes it: by its bytes, in octal."""
    if "\\" not in text:
        return text

    def byte(match: re.Match[bytes]) -> bytes:
        code = match[1]
        return bytes((int(code, 8) & 0xFF,)) if len(code) == 3 else _ESCAPED.get(code, code)

    return _ESCAPE.sub(byte, text.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")


def _literal(text: str) -> object:
    """The number, string or tuple of numbers in a text; the text itself if it is something else."""
    whole = _ITEM.fullmatch(text)
    if whole is not None:
        return _unescaped(whole[1])
    if "\\" in text or '"' in text or "'" in text:
        return text
    import ast

    try:
        value: object = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, (bool, int, float, tuple, type(None))) else text

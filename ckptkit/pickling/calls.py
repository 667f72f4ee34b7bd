"""Calls that reach further than the name that is called: by what they are given.

- ``getattr(a.B, "c")`` is the name ``a.B.c``, and is judged as one: Python pickles bound methods,
  nested classes and enumeration members so, and attackers ``getattr(torch.serialization, "os")``.
- ``reduce_graph_module(body, imports)`` of ``torch.fx`` runs ``imports + body["_code"]`` as Python text, function body
  included (``torch/fx/graph_module.py`` traces it).  That is how every FX GraphModule is pickled, so the call needs
  trust but is not hostile by itself.  It is where the text contains what torch never generates there: anything but
  imports in the first part, anything but one function (and ``wrap("name")``) in the second, or dangerous names in
  either.

  ``reduce_package_graph_module`` of torch.package takes the text from the package's own sources.
- ``functools.reduce(operator.or_, types)`` is ``int | None``; anything else that is reduced is hostile.
- ``torch.storage._load_from_bytes(data)`` is a tensor if the names in that data are those of tensors.
- cloudpickle and dill keep functions and classes by their code.  That needs trust; it is hostile where the pickle
  itself calls such a function, gives it to something that does, or builds a class around it.
- ``functools.partial(f, x)`` that is called is the call of ``f``.

The text is checked against patterns; it is neither compiled nor parsed.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterable
from functools import partial

from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.pickling.dangerous import is_dangerous, is_dangerous_attribute, is_kept_code, makes_function
from ckptkit.pickling.inert import Global, InertDict, Object, named_items
from ckptkit.startup import pattern

__all__ = ["CallsThatReach", "sets_first_argument"]

_MAX_CHAIN = 8
"""Attributes of attributes: nested classes go two or three deep."""

_IMPORT = pattern(r"import ([\w.]+)(?: as \w+)?|from ([\w.]+) import (\w+)(?: as \w+)?")
_OTHER_TOP_LEVEL = pattern(
    r"NoneType = type\(None\)|\w+ = '[^'\\]*'|\w+ = \"[^\"\\]*\"|#.*|(?:\w+\.)*wrap\(\"\w+\"\)|wrap\('\w+'\)"
    r"|def forward\(.*|\).*:"
)
_WORD = pattern(r"(\.[\s\\]*|['\"])?(?<!\w)([^\W\d]\w*)")
_BUILTINS = frozenset(
    {"__import__", "breakpoint", "compile", "delattr", "eval", "exec", "execfile", "globals", "locals", "open"}
)
"""What generated code neither calls nor gives a variable's name."""


_EXCUSED = {
    "functools.reduce": "_reduce", "_functools.reduce": "_reduce", "__builtin__.reduce": "_reduce",
    "builtins.setattr": "_setattr", "__builtin__.setattr": "_setattr",
    "torch.storage._load_from_bytes": "_load_from_bytes",
}  # fmt: skip
"""Functions that honest files call too, and what looks at each call: harmless ones are counted."""

_CALLERS = frozenset(
    {f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("map", "filter")}
    | {f"itertools.{name}" for name in (
        "accumulate", "dropwhile", "filterfalse", "groupby", "ifilter", "ifilterfalse", "imap", "starmap", "takewhile")}
    | {"_functools.cmp_to_key", "_operator.call", "functools.cmp_to_key", "functools.partialmethod", "operator.call",
       "torch._tensor._rebuild_from_type", "torch._tensor._rebuild_from_type_v2", "torch.tensor._rebuild_from_type",
       "torch.utils._pytree.tree_map"}
)  # fmt: skip
"""Functions that call the first thing they are given."""

_HOLDERS = frozenset(
    ("bytearray", "bytes", "classmethod", "complex", "defaultdict", "deque", "dict", "frozenset", "getattr", "iter",
     "list", "partial", "property", "set", "setattr", "slice", "staticmethod", "tuple", "zip", "_reconstructor")
)  # fmt: skip
"""Functions and classes in lower case that keep what they are given, and do not call it."""

_GETATTRS = ("getattr", "_get_attr", "_getattribute")
_IMPORTS = ("subimport", "_import_module")
_SETTERS = (
    "_setattr",
    "_class_setstate",
    "_function_setstate",
    "_fill_function",
    "_rehydrate_skeleton_class",
    "_setitems",
)


class CallsThatReach:
    """Looks at such calls in one pickle.

    Args:
        name: from module and name to the pickle's node for it; what is reached is listed so.
        nested: the names in a file of torch before 1.6 that the pickle holds, and whether it is one and can be read.

    Attributes:
        is_watchful: whether there is a name whose later use matters, and the use of its results.
    """

    def __init__(
        self,
        name: Callable[[str, str], Global],
        nested: Callable[[bytes], tuple[Iterable[Global], bool]] | None = None,
    ) -> None:
        self._name = name
        self._nested = nested
        self._text_left = DEFAULT_LIMITS.generated_characters
        self._arguments_left = DEFAULT_LIMITS.arguments
        self.is_watchful = False

    def watcher(self, callee: Global) -> Callable[[tuple[object, ...]], None] | None:
        """The function to call with the arguments of each call of a name; ``None``: nothing."""
        module, name = callee.module, callee.name
        if name == "getattr" and module in ("builtins", "__builtin__"):
            return partial(self._getattr, callee)
        if name == "reduce_graph_module" and module.startswith("torch.fx."):
            return partial(self._graph_module, callee)
        if name == "_ufunc_reconstruct" and module.startswith("numpy."):
            return partial(self._imported_name, callee)
        if callee.qualified in _CALLERS:
            return partial(self._caller, callee)
        excused = _EXCUSED.get(callee.qualified)
        if excused is not None:
            self.is_watchful = True
            return partial(getattr(self, excused), callee)
        if is_kept_code(module, name):
            self.is_watchful = True
            return partial(self._kept_code, callee)
        return None

    def _getattr(self, callee: Global, args: tuple[object, ...]) -> None:
        names: list[str] = []
        node: object = Object("reduce", callee, args)
        while isinstance(node, Object) and isinstance(node.cls, Global) and node.cls.name in _GETATTRS:
            if len(names) >= _MAX_CHAIN or len(node.args) < 2 or not isinstance(node.args[1], str):
                callee.offence = "an attribute whose name is computed, or a chain of attributes"
                return
            names.append(node.args[1])
            node = node.args[0]
        names.reverse()
        if (module := _imported(node)) is not None:
            self._name(module, ".".join(names))
            return
        if isinstance(node, Object):
            node = node.cls
        if isinstance(node, Global):
            self._name(node.module, ".".join((node.name, *names)))
        elif any(is_dangerous("_", name) or is_dangerous_attribute(name.rpartition(".")[2]) for name in names):
            callee.offence = f"the attribute {names[-1]!r:.80}"

    def _imported_name(self, callee: Global, args: tuple[object, ...]) -> None:
        if len(args) == 2 and isinstance(args[0], str) and isinstance(args[1], str):
            self._name(args[0], args[1])
        else:
            callee.offence = "imports a name that is computed"

    def _reduce(self, callee: Global, args: tuple[object, ...]) -> None:
        """``int | None`` is pickled so (``Lib/copyreg.py`` ``pickle_union``)."""
        function = args[0] if len(args) == 2 else None
        callee.excused += isinstance(function, Global) and function.qualified in ("operator.or_", "_operator.or_")

    def _setattr(self, callee: Global, args: tuple[object, ...]) -> None:
        """Dill gives the functions and classes that it keeps their attributes so."""
        callee.excused += _is_made_here(args[0]) if args else 0

    def _load_from_bytes(self, callee: Global, args: tuple[object, ...]) -> None:
        """Tensors that ``pickle.dump`` wrote (``torch/storage.py`` ``__reduce__``): a file of torch in the pickle."""
        found, is_whole = self._nested(_bytes(args[0])) if args and self._nested is not None else ((), False)
        callee.excused += is_whole
        for inner in found:
            known = self._name(inner.module, inner.name)
            known.calls += inner.calls
            known.excused += inner.excused
            known.offence = known.offence or inner.offence

    def _caller(self, callee: Global, args: tuple[object, ...]) -> None:
        function, _ = self._callee(args[0], args[1:]) if args else (None, ())
        if function is not None and (function.name in _GETATTRS or is_kept_code(function.module, function.name)):
            function.offence = f"is passed to {callee.qualified}, which calls it"

    def _kept_code(self, callee: Global, args: tuple[object, ...]) -> None:
        name, first = callee.name.rpartition(".")[2], args[0] if args else None
        if name in _IMPORTS and not isinstance(first, str):
            callee.offence = "imports a module whose name is computed"
        elif name in _GETATTRS:
            self._getattr(callee, args)
        elif name in _SETTERS and not isinstance(first, InertDict) and not _is_made_here(first):
            callee.offence = "changes something that the file's own code did not create"
        elif name in ("_create_type", "_make_skeleton_class"):
            self.computed(first, args[1:])

    def computed(self, cls: object, args: tuple[object, ...]) -> None:
        """Look at the call of something that is itself computed."""
        maker = self._kept_function(cls)
        if maker is not None:
            maker.offence = "makes a function from code in the file, and the pickle calls it"
            return
        function, given = self._callee(cls, args)
        watch = self.watcher(function) if function is not None else None
        if function is not None and watch is not None:
            function.calls += 1
            watch(given)

    def handed(self, cls: object, args: tuple[object, ...]) -> None:
        """Examine a call's arguments, once there is a name that matters wherever it is passed."""
        function, _ = self._callee(cls, ())
        keeps = function is None or not _calls_back(function)
        stack: list[object] = list(args)
        if _is_dills_setter(args):  # judged by its arguments then
            setter = stack.pop()
            if isinstance(setter, Global):
                setter.calls += 1
                setter.excused += 1
        while stack:
            node = stack.pop()
            self._arguments_left -= 1
            if self._arguments_left < 0:
                if function is not None:
                    function.offence = f"is given more than {DEFAULT_LIMITS.arguments:,} values"
                return
            if isinstance(node, (list, tuple)):
                stack.extend(node[: self._arguments_left + 1])
            elif isinstance(node, InertDict):
                stack.extend(value for _, value in node.pairs[: self._arguments_left + 1])
            elif isinstance(node, Global) and node.qualified in _EXCUSED:
                node.offence = "is passed on, so what it calls cannot be known"
            elif not keeps and (maker := self._kept_function(node)) is not None:
                maker.offence = "makes a function from code in the file, and the pickle has it called"

    def changed(self, target: Object) -> None:
        """Look at something whose attributes the pickle sets."""
        if _imported(target) is not None and isinstance(target.cls, Global):
            target.cls.offence = "imports a module, which the pickle then changes"

    def _graph_module(self, callee: Global, args: tuple[object, ...]) -> None:
        body = dict(named_items(args[0])) if args else {}
        code = body.get("_code") or body.get("code")
        if len(args) != 2 or not isinstance(args[1], str) or not isinstance(code, str):
            callee.offence = "runs text that is missing or computed"
            return
        self.text(callee, args[1] + code)

    def text(self, callee: Global, text: str) -> None:
        """Judge a name by the generated code that it runs."""
        self._text_left -= len(text)
        if self._text_left < 0:
            callee.offence = f"runs more than {DEFAULT_LIMITS.generated_characters:,} characters of text"
        elif not callee.offence:
            callee.offence = _offence(text)

    def _callee(self, node: object, args: tuple[object, ...]) -> tuple[Global | None, tuple[object, ...]]:
        """The name that is called in the end, and with which arguments, where some of them were given before.

        ``None``: what is called is the result of another call.
        """
        for _ in range(_MAX_CHAIN):
            if isinstance(node, Global):
                if node.name not in ("__newobj__", "__newobj_ex__") or not args:
                    return node, args
                node, args = args[0], args[1:]
                continue
            cls = node.cls if isinstance(node, Object) else None
            if not isinstance(node, Object) or not isinstance(cls, Global):
                return None, ()
            if cls.name == "partial":
                state = node.state if isinstance(node.state, tuple) else ()
                given = state[1] if len(state) > 1 and isinstance(state[1], tuple) else node.args[1:]
                node, args = (*state, *node.args, None)[0], (*given, *args)
            elif cls.name in _GETATTRS and node.args[1:] == ("__new__",):
                node, args = node.args[0], args[1:]
            elif cls.name in _GETATTRS and len(node.args) > 1 and isinstance(node.args[0], Global):
                return self._name(node.args[0].module, f"{node.args[0].name}.{node.args[1]}"), args
            elif cls.name in ("_builtin_type", "_load_type") and node.args[:1] in (("FunctionType",), ("LambdaType",)):
                return cls, args
            else:
                return None, ()
        if isinstance(node, Object) and isinstance(node.cls, Global):
            node.cls.offence = "is called through itself repeatedly"
        return None, ()

    def _kept_function(self, node: object) -> Global | None:
        """The name that made a function of its code; ``None``: the node is not such a function."""
        for _ in range(_MAX_CHAIN):
            if not isinstance(node, Object):
                return None
            if not isinstance(node.cls, Global) or node.cls.name != "partial":
                break
            node = (*(node.state if isinstance(node.state, tuple) else ()), *node.args, None)[0]
        if not isinstance(node, Object):
            return None
        function, _ = self._callee(node.cls, node.args)
        if function is None or (isinstance(node.cls, Global) and function.name in ("_builtin_type", "_load_type")):
            return None
        return function if makes_function(function.module, function.name) else None


def sets_first_argument(call: Object) -> bool:
    """Whether what is called sets something of its first argument: ``setattr``, or cloudpickle's and dill's own."""
    if isinstance(call.cls, Object):
        return _is_dills_setter(call.cls.args)
    if not isinstance(call.cls, Global):
        return False
    if call.cls.qualified in ("builtins.setattr", "__builtin__.setattr"):
        return True
    return is_kept_code(call.cls.module, call.cls.name) and call.cls.name.rpartition(".")[2] in _SETTERS


def _is_made_here(node: object) -> bool:
    """Whether a function or class is made from the file's own code."""
    if not isinstance(node, Object) or not isinstance(node.cls, Global):
        return False
    return is_kept_code(node.cls.module, node.cls.name) or node.cls.qualified in ("builtins.type", "__builtin__.type")


def _is_dills_setter(args: tuple[object, ...]) -> bool:
    """Whether these are the arguments of ``getattr(dill._dill, "_setattr", setattr)`` (``dill/_shims.py``)."""
    module, *rest = args or (None,)
    if not isinstance(module, Global) or module.qualified != "dill._dill" or len(rest) != 2 or rest[0] != "_setattr":
        return False
    return isinstance(rest[1], Global) and rest[1].name == "setattr"


def _bytes(node: object) -> bytes:
    """Bytes, also in protocol 2's form: a text to encode."""
    if isinstance(node, Object) and isinstance(node.cls, Global) and node.cls.qualified == "_codecs.encode":
        text = node.args[0] if node.args else ""
        node = text.encode("latin1", "replace") if isinstance(text, str) else b""
    return node if isinstance(node, bytes) else b""


def _imported(node: object) -> str | None:
    """The module that cloudpickle's or dill's import gives."""
    if not isinstance(node, Object) or not isinstance(node.cls, Global) or node.cls.name not in _IMPORTS:
        return None
    return node.args[0] if node.args and isinstance(node.args[0], str) else None


def _calls_back(function: Global) -> bool:
    """Whether a function of Python or torch's may call what it is given; classes keep it."""
    root, name = function.module.partition(".")[0], function.name
    if name[:1].isupper() or name in _HOLDERS or is_kept_code(function.module, name):
        return False
    return root in sys.stdlib_module_names or root in ("__builtin__", "numpy", "torch")


def _offence(text: str) -> str:
    """A part of generated code that torch never generates; ``""``: none."""
    text = unicodedata.normalize("NFKC", text)  # as Python does with identifiers
    for line in text.splitlines():
        if not line or line[0] in " \t":
            continue
        found = _IMPORT.fullmatch(line)
        if found is not None:
            module, name = found[1] or found[2], found[3] or ""
            if is_dangerous(module, name or "_"):
                return f"its text says {line[:80]!r}"
        elif not _OTHER_TOP_LEVEL.fullmatch(line):
            return f"its text contains more than imports and one function: {line[:80]!r}"
    for found in _WORD.finditer(text):
        before, word = found[1] or "", found[2]
        # Parameters may have any name ("signal", "input"); attributes that are modules are never used.
        if before.startswith(".") or (word.startswith("__") and word.endswith("__")):
            if is_dangerous_attribute(word):
                return f"its text names {word[:80]!r}"
        elif word in _BUILTINS and not before:
            return f"its text names {word[:80]!r}"
    return ""

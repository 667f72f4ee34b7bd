"""The common representation every container is read into and written from.

A `Checkpoint` says *where* bytes are and never contains them; its tensors are those of `ckptkit.tensor`.

No I/O happens here.  Everything is immutable; a rewrite makes new objects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, ValuesView
from dataclasses import field, replace
from itertools import islice
from typing import Final, Literal, NamedTuple, Protocol, get_args

from ckptkit.errors import KeyCollisionError, RewriteError
from ckptkit.report import Finding, count_of, listed, printable
from ckptkit.startup import dataclass
from ckptkit.tensor import Storage, TensorEntry, as_tensor, contiguous_stride, shared_storages, tied_groups

__all__ = [
    "STATE_DICT",
    "WEIGHTS",
    "Checkpoint",
    "GlobalUse",
    "Kind",
    "Origin",
    "Part",
    "Replica",
    "Section",
    "Spread",
    "StateDict",
    "Storage",
    "TensorEntry",
    "Trust",
    "Unread",
    "as_tensor",
    "contiguous_stride",
    "shared_storages",
    "tied_groups",
    "trust_of",
]

_SHOWN, _MAX_REPR = 2, 190
"""Tensors that the ``repr`` of a state_dict names, and its characters."""

Kind = Literal["whole_model", "state_dict", "resume", "tensor", "collection", "other"]
"""The content of a file: a pickled ``nn.Module``; a state_dict; weights with training state; one bare tensor; tensors
that are not a state_dict; no tensors."""

Trust = Literal["safe", "needs_trust", "hostile"]
"""``safe``: plain data and torch's own rebuild functions.  ``needs_trust``: other names, which a loader that executes
the pickle has to trust.  ``hostile``: names that run, import or open things."""


class _Slot:
    """Type of `STATE_DICT`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<state_dict>"


STATE_DICT: Final = _Slot()
"""Marks in `Checkpoint.rest` the place of the state_dict in the file."""


class StateDict(Mapping[str, TensorEntry]):
    """Named tensors in file order, with everything else in a saved state_dict.

    As a mapping it contains only the plain tensors.  Other values (``_extra_state`` objects, quantized and sparse
    tensors) keep their place in `everything` and are listed by `extra`.

    It is immutable and contains no values: any number of threads may read its tensors, and reading them one after
    another takes no more memory than one.

    Attributes:
        everything: every key with its value, in file order; values are `TensorEntry` or inert nodes.
        versions: torch's ``_metadata``: for each module path an inert node (``{"version": 2}``), or ``None`` if the
            file has none.
        container: inert node of the mapping's class and other attributes; ``None`` means that a plain ``OrderedDict``
            is written.
        is_module: whether ``container`` is the module that the values were walked from, which is then written
            unchanged.  After renaming, selecting or casting, a state_dict is written instead.
    """

    __slots__ = ("_is_plain", "_tensors", "container", "everything", "is_module", "versions")

    def __init__(
        self,
        everything: Mapping[str, object] = {},
        *,
        versions: Mapping[str, object] | None = None,
        container: object = None,
        is_module: bool = False,
    ) -> None:
        self.everything = everything
        self.versions = versions
        self.container = container
        self.is_module = is_module
        self._is_plain: bool | None = None
        self._tensors: Mapping[str, TensorEntry] = everything  # type: ignore[assignment]  # one of them is enough
        if set(map(type, everything.values())) - {TensorEntry}:
            self._tensors = {k: v for k, v in everything.items() if isinstance(v, TensorEntry)}

    def __getitem__(self, name: str) -> TensorEntry:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def items(self) -> ItemsView[str, TensorEntry]:
        return self._tensors.items()

    def values(self) -> ValuesView[TensorEntry]:
        return self._tensors.values()

    def __repr__(self) -> str:
        shown = [f"{name:.40} {entry.dtype} {[*entry.shape]}"[:60] for name, entry in islice(self.items(), _SHOWN)]
        told = f": {listed(shown, total=len(self))}" if shown else ""
        return printable(f"StateDict({count_of(len(self), 'tensor')}{told}")[:_MAX_REPR] + ")"

    def _repr_html_(self) -> str:
        """For notebooks: the tree of its names."""
        return _html(f"StateDict: {count_of(len(self), 'tensor')}", (), self)

    @property
    def is_plain(self) -> bool:
        """Whether all its values are tensors with nothing below them, as in nearly all files."""
        if self._is_plain is None:
            self._is_plain = len(self._tensors) == len(self.everything) and all(
                entry.attributes is None and entry.subclass is None and not entry.effects
                for entry in self._tensors.values()
            )
        return self._is_plain

    @property
    def extra(self) -> dict[str, object]:
        """The values that are not plain tensors, by name."""
        if len(self._tensors) == len(self.everything):
            return {}
        return {k: v for k, v in self.everything.items() if k not in self._tensors}

    def with_values(self, function: Callable[[object], object]) -> StateDict:
        """The same names with ``function`` applied to every value, extra ones too."""
        return StateDict(
            {name: function(value) for name, value in self.everything.items()},
            versions=self.versions,
            container=self.container,
            is_module=self.is_module,
        )

    def holding(self, everything: Mapping[str, object], versions: Mapping[str, object] | None) -> StateDict:
        """The same mapping with other values: of the same class, or for a module its state_dict."""
        return StateDict(everything, versions=versions, container=None if self.is_module else self.container)

    def renamed(self, rename: Callable[[str], str], versions: Mapping[str, object] | None) -> StateDict:
        """The same values under the names that ``rename`` returns, in the same order.

        Args:
            rename: from old name to new name.
            versions: the module versions that go with the new names.

        Raises:
            KeyCollisionError: two names would become the same; nothing is renamed.
        """
        everything: dict[str, object] = {}
        came_from: dict[str, str] = {}
        for name, value in self.everything.items():
            target = rename(name)
            if target in everything:
                raise KeyCollisionError(came_from[target], name, target)
            everything[target] = value
            came_from[target] = name
        return self.holding(everything, versions)


WEIGHTS: Final = ("state_dict", "whole_model")
"""Kinds of sections that could be the checkpoint's state_dict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a file that contains tensors.

    Attributes:
        path: the keys that lead to it, joined with dots; ``""`` is the whole file.  Paths of a file are unique: if keys
            would give two sections the same path, ``#2`` and so on follow.
        kind: ``"state_dict"``, ``"whole_model"``, ``"optimizer"``, ``"collection"`` or ``"tensor"``.
        tensors: number of tensors in it.
        nbytes: bytes of the storages it uses (shared ones once).
        selected: whether it is the checkpoint's state_dict.
    """

    path: str
    kind: str
    tensors: int
    nbytes: int
    selected: bool = False

    @property
    def is_weights(self) -> bool:
        """Whether it could be the checkpoint's state_dict."""
        return self.kind in WEIGHTS


Verdict = Literal["torch", "allowed", "unknown", "dangerous"]

GRAVITY: Mapping[Verdict, int] = {"torch": 0, "allowed": 0, "unknown": 1, "dangerous": 2}
"""How severe each verdict is: the most severe of several counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalUse:
    """A Python name in a pickle, never resolved; or another part of a file that matters for trust.

    Attributes:
        name: ``"module.attribute"``; for a part, what it is: ``"compiled code"``.
        verdict: see `ckptkit.pickling.trust`.
        count: how often the pickle calls it, at least 1; for parts, how many there are.
        where: a few of the places where it occurs: the record, and the keys in its tree:
            ``("data.pkl: args",)``.
        reason: what else to know about it; ``""``: nothing.
        kind: ``"name"``; ``"code"``: a part that runs when the file is loaded; ``"unread"``: a part that could not be
            read.
    """

    name: str
    verdict: Verdict
    count: int
    where: tuple[str, ...] = ()
    reason: str = ""
    kind: Literal["name", "code", "unread"] = "name"


def trust_of(uses: Iterable[GlobalUse]) -> Trust:
    """The trust in a file that follows from the most severe of its verdicts."""
    worst = max((GRAVITY[use.verdict] for use in uses), default=0)
    order: tuple[Trust, ...] = get_args(Trust)
    return order[worst]


class Spread(NamedTuple):
    """How a checkpoint that several processes wrote is spread over files.

    Attributes:
        world_size: how many processes wrote it; ``None``: not known.
        mesh: sizes of the dimensions of the mesh that they form, by name; ``None``: not known.
        files: number of its files.
        tag: the name of the step, if the folder given has several.
    """

    world_size: int | None
    mesh: Mapping[str, int] | None
    files: int
    tag: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a checkpoint came from.

    Attributes:
        path: the file.
        size: its size in bytes.
        format: container name, such as ``"torch-zip"``.
        format_version: the container's own version, if it has one.
        byteorder: ``"little"`` or ``"big"``.
        kind: what the file contains.
        state_path: the keys that lead to the state_dict, joined with dots; ``""`` is the whole file; ``None``: the file
            has no state_dict, or several of which none was chosen.
        pickle_protocol: of the file's object pickle; ``None`` if it has none.
        writer: which torch wrote it, as far as the file shows: ``"torch 2.1 or later"``.
        has_pickle: whether there is a pickle in the file.
        is_program: whether it contains a program, of which only the weights can be written.
        options: command-line options that make it read this way: ``("--section", "model")``.
        spread: for a folder that several processes wrote, how it is spread; ``None``: it is one file, or shards with an
            index.
    """

    path: str
    size: int
    format: str
    kind: Kind
    format_version: str | None = None
    byteorder: Literal["little", "big"] = "little"
    state_path: str | None = None
    pickle_protocol: int | None = None
    writer: str | None = None
    has_pickle: bool = True
    is_program: bool = False
    options: tuple[str, ...] = ()
    spread: Spread | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which part of a checkpoint stored in several files a file is.

    Attributes:
        layout: what the files are together, in words: ``"a DeepSpeed ZeRO stage 3 checkpoint"``.
        piece: which part: ``"rank 0 of 8"``; ``""``: not known.
        lacks: what is not in this file.
        instead: the index that opens them all, or the folder of the files that belong together; ``None``: there is
            none.
        opens: whether ckptkit opens ``instead`` as one checkpoint.
        remedy: what helps, if giving other files does not.
    """

    layout: str
    piece: str = ""
    lacks: str
    instead: str | None = None
    opens: bool = False
    remedy: str = ""


class Replica(NamedTuple):
    """Values stored in two places that must be the same.

    Attributes:
        name: of the tensor.
        value: the one that was taken.
        copy: the other; if its dtype differs, it is ``value`` converted to that dtype.
        where: where they come from, for messages: ``"rank 0 and rank 2"``.
    """

    name: str
    value: TensorEntry
    copy: TensorEntry
    where: str


class Unread(Protocol):
    """Parts of a checkpoint that are separate pickles, read only when their values are."""

    def judge(self) -> tuple[GlobalUse, ...]:
        """Read them all and return the verdict on every name in them.

        Raises:
            FormatError: one is damaged, or is not what it should be.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Checkpoint:
    """A checkpoint in the common representation.

    Attributes:
        state_dict: the weights.
        rest: everything else, an inert tree whose leaves may be `TensorEntry` too; the marker `STATE_DICT` is in the
            place of the weights.
        metadata: the container's own string metadata (safetensors ``__metadata__``).
        origin: the file it came from.
        sections: the parts that contain tensors, in file order.
        globals: every Python name in the file's pickles.
        unvouched: parts of the file that are code or could not be read.
        module: inert node of the pickled ``nn.Module`` the state_dict was walked from, or ``None``.
        findings: what the reader noticed.
        discarded: inert nodes of what its pickles make and discard, and nothing they keep refers to.
        part: which part of a checkpoint in several files it is; ``None``: it is the whole.
        replicas: values in several of its files that must be the same; every reader of its bytes compares them.
        unread: what was not read when it was opened; if there is anything, ``unvouched`` says so.
        operations: what `rewrite` did to it, in order.
    """

    state_dict: StateDict
    rest: object
    origin: Origin
    metadata: Mapping[str, str] = field(default_factory=dict)
    sections: tuple[Section, ...] = ()
    globals: tuple[GlobalUse, ...] = ()
    unvouched: tuple[GlobalUse, ...] = ()
    module: object = None
    findings: tuple[Finding, ...] = ()
    discarded: tuple[object, ...] = ()
    part: Part | None = None
    replicas: tuple[Replica, ...] = ()
    unread: Unread | None = None
    operations: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Checkpoint of {self.origin.path!r}: {self.origin.kind}, {count_of(len(self.state_dict), 'tensor')}>"

    def _repr_html_(self) -> str:
        """For notebooks: what it is, and the tree of the names of its weights."""
        from ckptkit.report import human_size

        origin, kind, trust = self.origin, self.origin.kind.replace("_", " "), self.trust.replace("_", " ")
        lines = [
            f"{origin.format}, {kind}, {human_size(origin.size)}, {trust}",
            count_of(len(self.state_dict), "tensor"),
        ]
        lines += [f"rewritten: {listed(map(str, self.operations))}"] if self.operations else []
        return _html(origin.path, lines, self.state_dict)

    @property
    def trust(self) -> Trust:
        """How much a loader that executes pickles would have to trust the file; see `Trust`."""
        return trust_of((*self.globals, *self.unvouched))

    def rewrite(self, *rewriters: Callable[[Checkpoint], Checkpoint]) -> Checkpoint:
        """The checkpoint with each rewriter applied in turn; this one does not change.

        Raises:
            RewriteError: one cannot be applied, or does not return a checkpoint.
        """
        result = self
        for rewriter in rewriters:
            try:
                result = rewriter(result)
            except RewriteError as error:
                error.path = self.origin.path if error.path is None else error.path
                raise
            if not isinstance(result, Checkpoint):
                kind = type(result).__name__
                raise RewriteError(
                    f"{_called(rewriter)} returned {kind}; a rewriter returns a Checkpoint", path=self.origin.path
                )
            result = result.replace(operations=(*result.operations, _called(rewriter)))
        return result

    def replace(self, **changes: object) -> Checkpoint:
        """A copy with the named attributes replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]


def _called(rewriter: object) -> str:
    """A rewriter as it would be written, without what differs from run to run."""
    name = getattr(rewriter, "__qualname__", None)
    return f"{name}()" if isinstance(name, str) else re.sub(r" at 0x[0-9a-fA-F]+", "", repr(rewriter))


def _html(title: str, lines: Iterable[str], state_dict: StateDict) -> str:
    """Title, lines, and the tree of names as a notebook shows them; what is tied counts once."""
    from ckptkit.display import html_block, names_tree

    first = {name: names[0] for names in tied_groups(state_dict) for name in names[1:]}
    tree, left_out = names_tree(
        (name, f"{entry.dtype} {[*entry.shape]}", entry.numel, entry.nbytes)
        if name not in first
        else (name, f"{entry.dtype} {[*entry.shape]} = {first[name]}", 0, 0)
        for name, entry in state_dict.items()
    )
    return html_block(title, lines, tree=tree, tree_left_out=left_out)

"""torch.package: objects, the Python code they need, and their storages in one archive.

Layout: a torch archive (`ckptkit.formats.torch_archive`; ``torch/package/package_exporter.py`` and
``package_importer.py``):

- ``PACKAGE/RESOURCE``: what ``save_pickle`` (pickle protocol 3), ``save_text`` and ``save_binary`` wrote; the name does
  not tell them apart, so a resource that begins like a pickle is one
- ``….py``: the sources of the modules that were interned, run by the importer
- ``.data/KEY.storage``: the storages, shared by all pickles; the KEY in a persistent id is an int
- ``.data/extern_modules``: names of the modules that are imported from outside, one per line
- ``.data/python_version``, ``.data/version``
- ``.data/ts_code/ID/data.pkl`` and ``constants.pkl``: a TorchScript module, whose storages are the
  package's; all share the source in ``.data/ts_code/code/``

A pickle names such a module by the persistent id ``('reduce_package', number, function, (ID,))``
(without the number before 1.9).

The tree maps each pickled resource's name to its object.  Classes in the package are as foreign as
any: their code is the package's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ckptkit.checkpoint import GlobalUse, Kind
from ckptkit.errors import CorruptError
from ckptkit.formats.format import Probe
from ckptkit.formats.torch_archive import TorchArchive
from ckptkit.formats.torchscript import as_modules, vouched
from ckptkit.formats.torchscript_code import ScriptClasses
from ckptkit.normalize import RawCheckpoint
from ckptkit.normalize.sections import SectionSearch
from ckptkit.pickling.calls import CallsThatReach
from ckptkit.pickling.dialects import ScriptStorageTable
from ckptkit.pickling.inert import Global, InertDict, PersistentId
from ckptkit.report import Finding, count_of, listed

__all__ = ["read"]

_NAME = "torch-package"
_SCRIPTS = ".data/ts_code/"
_UNPACKAGE = "torch.jit._script.unpackage_script_module"
_GRAPH = "torch.fx.graph_module.reduce_package_graph_module"
_PICKLE_STARTS = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))


def read(probe: Probe) -> RawCheckpoint:
    """The tree and the container's facts.

    Raises:
        FormatError: the file is damaged or refused.
    """
    archive = TorchArchive(probe.records, probe.limits)
    version, byteorder = archive.version(), archive.byteorder()
    package = _Package(archive, byteorder)
    resources = [name for name in archive.records if _is_resource(name)]
    pickles = [name for name in resources if _is_pickle(archive, name)]
    parts: list[tuple[object, object]] = [(name, package.load(name)) for name in pickles]
    scripts = [name for name in archive.records if name.startswith(_SCRIPTS) and name.endswith("/data.pkl")]
    for name in scripts:
        number = name[len(_SCRIPTS) : -len("/data.pkl")]
        if number not in package.scripts:
            parts.append((f"{_SCRIPTS}{number}", package.script(number)))
    for name in _sources(archive):
        archive.code(name, "Python source", "the package's importer runs it")
    archive.mark(name for name in archive.records if not name.startswith(".data/"))
    archive.mark(name for name in archive.records if name.startswith(_SCRIPTS))
    return RawCheckpoint(
        root=InertDict(parts),
        kind=_kind([node for _, node in parts]),
        format=_NAME,
        format_version=version,
        byteorder=byteorder,
        pickle_protocol=package.protocol,
        writer=archive.writer(),
        globals=_vouched(vouched(archive.uses())),
        has_pickle=archive.has_pickle,
        discarded=archive.discarded,
        findings=(*archive.findings(), *_findings(archive, pickles, scripts)),
    )


def _kind(objects: list[object]) -> Kind | None:
    """The content of a package with these objects: its only one, or a collection; ``None``: no tensors."""
    found = [section for node in objects for section in SectionSearch(node).sections()]
    if len(objects) == 1 and len(found) == 1 and found[0].node is objects[0] and found[0].kind != "optimizer":
        return found[0].kind
    return "collection" if found else None


def _is_resource(name: str) -> bool:
    return not name.startswith(".data/") and not name.endswith("/") and name != "byteorder"


def _is_pickle(archive: TorchArchive, name: str) -> bool:
    """Whether a resource begins like a pickle: `PackageImporter.load_pickle` may be asked to load any."""
    record = archive.records[name]
    if record.deflated:
        return archive.read(name).startswith(_PICKLE_STARTS)
    return record.nbytes > 1 and record.data.read(0, 2) in _PICKLE_STARTS


def _vouched(uses: tuple[GlobalUse, ...]) -> tuple[GlobalUse, ...]:
    """The verdicts, with the function that takes a TorchScript module out of the package as torch's."""
    return tuple(
        replace(use, verdict="torch") if use.name == _UNPACKAGE and use.verdict == "unknown" else use for use in uses
    )


class _Package:
    """The pickles of one package, which share their storages and TorchScript modules."""

    def __init__(self, archive: TorchArchive, byteorder: str) -> None:
        self._archive = archive
        locate = archive.locator(".data/", ".storage")
        self._table = ScriptStorageTable(locate, byteorder=byteorder, limits=archive.limits)
        self._classes = ScriptClasses(archive, f"{_SCRIPTS}code/")
        self._reach = CallsThatReach(Global)
        self.scripts: dict[str, object] = {}
        self.protocol: int | None = None

    def load(self, name: str) -> object:
        """The object in a pickled resource."""
        pickle = self._archive.pickle(name, self._table, persistent_load=self._persistent_load)
        self.protocol = pickle.protocol if self.protocol is None else self.protocol
        return pickle.root

    def _persistent_load(self, pid: object) -> object:
        if not isinstance(pid, tuple) or len(pid) < 3 or not isinstance(pid[0], str):
            raise CorruptError("a persistent id that is neither a storage nor an object of the package")
        if pid[0] == "storage":
            key = str(pid[2]) if isinstance(pid[2], int) else pid[2]
            return self._table.persistent_load((*pid[:2], key, *pid[3:]))
        function, args = pid[-2], pid[-1]
        if isinstance(function, Global) and isinstance(args, tuple):
            self._called(function, args)
        if isinstance(function, Global) and function.qualified == _UNPACKAGE and isinstance(args, tuple) and args:
            return self.script(args[0]) if isinstance(args[0], str) else PersistentId(pid)
        return PersistentId(pid)

    def _called(self, function: Global, args: tuple[object, ...]) -> None:
        """Judge a function that the importer calls, with itself as the first argument, by what it is given."""
        function.calls += 1
        if function.qualified == _GRAPH and len(args) == 2 and isinstance(args[1], str):
            path = args[1].replace(".", "/")
            name = next((name for name in (f"{path}.py", f"{path}/__init__.py") if name in self._archive.records), None)
            if name is not None:  # the text that it imports; without it nothing excuses the name
                function.excused += 1
                self._reach.text(function, self._archive.read(name).decode("utf-8", "replace"))
            return
        watch = self._reach.watcher(function)
        if watch is not None:
            watch((PersistentId(None), *args))

    def script(self, number: str) -> object:
        """A TorchScript module of the package."""
        if number not in self.scripts:
            load = self._load_from_script
            pickle = self._archive.pickle(f"{_SCRIPTS}{number}/data.pkl", self._table, persistent_load=load)
            self._archive.pickle(f"{_SCRIPTS}{number}/constants.pkl", self._table, persistent_load=load)
            as_modules(pickle.root, self._classes)
            self.scripts[number] = pickle.root
        return self.scripts[number]

    def _load_from_script(self, pid: object) -> object:
        """TorchScript's persistent ids have the whole name of the record as key."""
        if isinstance(pid, tuple) and len(pid) > 2 and isinstance(pid[2], str):
            pid = (*pid[:2], pid[2].removesuffix(".storage"), *pid[3:])
        return self._table.persistent_load(pid)


def _sources(archive: TorchArchive) -> list[str]:
    return [name for name in archive.records if name.endswith(".py") and not name.startswith(".data/")]


def _findings(archive: TorchArchive, pickles: list[str], scripts: list[str]) -> Iterator[Finding]:
    sources = _sources(archive)
    externs = archive.read(".data/extern_modules").decode("utf-8", "replace").split()
    python = archive.small(".data/python_version")
    has = [count_of(len(pickles), "pickled object"), count_of(len(scripts), "TorchScript module")][
        : 2 if scripts else 1
    ]
    message = f"a torch.package archive with {' and '.join(has)}"
    if sources:
        shown = listed([name[:80] for name in sources], 4)
        message += f", and {count_of(len(sources), 'Python source')} that its importer runs ({shown})"
    if externs:
        message += f"; it imports {listed([name[:40] for name in externs], 4)}"
    if python:
        message += f"; written with Python {python[:20]}"
    yield Finding(code="package-code", severity="warning" if sources else "info", message=message)

"""What a name in a pickle would mean for whoever executed it.

Four verdicts.  ``torch``: rebuild functions, storages and dtypes, which torch's own weights-only
loader runs.  ``allowed``: the plain containers it runs beside them.  ``dangerous``: names that
run code, import, open or reach out.  ``unknown``: all else, neither accused nor vouched for.
"""

from __future__ import annotations

from collections.abc import Iterable

from ckptkit.checkpoint import GlobalUse
from ckptkit.dtypes import BY_STORAGE_CLASS, DTYPES
from ckptkit.pickling.inert import Global

__all__ = ["assess", "global_uses"]

_TORCH_MODULES = {"torch._utils": "_rebuild_", "torch._tensor": "_rebuild_from_type_v2"}
_TORCH_NAMES = frozenset(
    {"torch." + name for name in (*DTYPES, *BY_STORAGE_CLASS, "Size", "device", "Tensor", "strided",
                                  "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc",
                                  "per_tensor_affine", "per_channel_affine", "UntypedStorage")}
    | {"torch.cuda." + name for name in BY_STORAGE_CLASS}
    | {"torch.storage.UntypedStorage", "torch.storage._UntypedStorage", "torch.storage.TypedStorage",
       "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch.serialization._get_layout"}
)  # fmt: skip

_ALLOWED = frozenset(
    {"collections.OrderedDict", "collections.Counter", "collections.defaultdict", "_codecs.encode"}
    | {f"{module}.{name}" for module in ("builtins", "__builtin__")
       for name in ("set", "frozenset", "list", "dict", "tuple", "bytes", "bytearray", "complex",
                    "int", "long", "float", "bool", "str", "unicode", "slice", "range", "xrange")}
)  # fmt: skip

_DANGEROUS_MODULES = frozenset(
    {
        "_ctypes", "_io", "_pickle", "_posixsubprocess", "_thread", "_winapi", "asyncio", "bdb", "cloudpickle",
        "codeop", "ctypes", "dill", "distutils", "ensurepip", "ftplib", "http", "httplib", "idlelib", "imaplib",
        "imp", "importlib", "joblib", "lib2to3", "linecache", "marshal", "nt", "ntpath", "os", "pdb", "pickle",
        "pip", "pkgutil", "poplib", "popen2", "posix", "posixpath", "pty", "pydoc", "runpy", "shelve", "shutil",
        "smtplib", "socket", "sqlite3", "ssl", "subprocess", "sys", "sysconfig", "timeit", "urllib", "urllib2",
        "urllib3", "venv", "webbrowser", "winreg", "xmlrpc", "zipimport",
    }
)  # fmt: skip
"""Top-level modules no checkpoint needs a name from.  Names that are also likely for a user's own
module (``code``, ``test``, ``types``) are listed by full name below instead."""

_DANGEROUS_NAMES = frozenset(
    {f"{module}.{name}" for module in ("builtins", "__builtin__")
     for name in ("eval", "exec", "execfile", "compile", "open", "file", "input", "raw_input", "__import__",
                  "apply", "reload", "breakpoint", "globals", "locals", "vars", "setattr", "delattr",
                  "exit", "quit", "help")}
    | {"code.InteractiveConsole", "code.InteractiveInterpreter", "code.interact", "commands.getoutput",
       "commands.getstatusoutput", "functools.reduce", "_functools.reduce", "io.FileIO", "io.open",
       "io.open_code", "numpy.fromfile", "numpy.load", "numpy.loadtxt", "numpy.savetxt",
       "numpy.core.records.fromfile", "numpy.f2py.crackfortran.myeval", "numpy.testing.runstring",
       "numpy.testing._private.utils.runstring", "operator.attrgetter", "operator.methodcaller",
       "_operator.attrgetter", "_operator.methodcaller", "profile.run", "cProfile.run", "tempfile.mktemp",
       "torch.load", "torch.save", "torch.serialization.load", "torch.jit.load",
       "torch.package.PackageImporter", "torch._utils._import_dotted_name", "trace.Trace",
       "types.CodeType", "types.FunctionType", "doctest.debug_script", "asyncio.unix_events"}
)  # fmt: skip

_DANGEROUS_PREFIXES = ("torch.hub.", "torch.utils.cpp_extension.", "torch.utils.model_zoo.", "torch.distributed.rpc.",
                       "numpy.distutils.", "setuptools.", "pandas.io.", "torch.utils.collect_env.",
                       "torch._dynamo.", "torch.fx.experimental.", "torch.utils.bottleneck.",
                       "torch.utils.data.datapipes.utils.")  # fmt: skip


def assess(name: Global) -> GlobalUse:
    """The verdict on one name."""
    module, qualified = name.module, name.qualified
    parts = name.name.split(".")
    if qualified in _TORCH_NAMES or any(
        module == known and name.name.startswith(prefix) for known, prefix in _TORCH_MODULES.items()
    ):
        verdict = "torch"
    elif qualified in _ALLOWED:
        verdict = "allowed"
    elif (
        module.split(".")[0] in _DANGEROUS_MODULES
        or qualified in _DANGEROUS_NAMES
        or qualified.startswith(_DANGEROUS_PREFIXES)
        or any(part.startswith("__") and part.endswith("__") for part in parts)  # attribute chains into internals
    ):
        verdict = "dangerous"
    else:
        verdict = "unknown"
    return GlobalUse(name=qualified, verdict=verdict, count=max(name.calls, 1))  # type: ignore[arg-type]


def global_uses(names: Iterable[Global]) -> tuple[GlobalUse, ...]:
    """The verdicts on all names, in order of appearance."""
    return tuple(assess(name) for name in names)

"""What a name in a pickle would mean for whoever executed it.

Four verdicts.  ``torch``: rebuild functions, storages and dtypes, which torch's own weights-only
loader runs.  ``allowed``: the plain containers it runs beside them.  ``dangerous``: names that
run code, import, open or reach out.  ``unknown``: all else, neither accused nor vouched for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from ckptkit.checkpoint import GlobalUse
from ckptkit.dtypes import BY_STORAGE_CLASS, DTYPES
from ckptkit.pickling.inert import Global

__all__ = ["assess", "global_uses"]

_REBUILD = re.compile(r"torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type(_v2)?")
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

_DANGEROUS_PACKAGES = frozenset(
    {
        "_ctypes", "_pickle", "_posixsubprocess", "_thread", "_winapi", "asyncio", "cloudpickle", "ctypes", "dill",
        "ensurepip", "http", "httplib", "idlelib", "importlib", "joblib", "lib2to3", "linecache", "marshal", "ntpath",
        "os", "pickle", "pip", "pkgutil", "posix", "posixpath", "pty", "pydoc", "runpy", "shelve", "shutil", "socket",
        "sqlite3", "ssl", "subprocess", "sys", "sysconfig", "timeit", "urllib", "urllib2", "urllib3", "venv",
        "webbrowser", "winreg", "xmlrpc", "zipimport",
    }
)  # fmt: skip
"""Top-level modules no checkpoint needs a name from, with all below them."""

_DANGEROUS_MODULES = frozenset(
    {
        "_aix_support", "_osx_support", "_pyrepl.pager", "bdb", "codeop", "commands", "distutils.core",
        "distutils.file_util", "distutils.spawn", "ftplib", "imaplib", "imp", "logging.config", "nt", "pdb", "poplib",
        "popen2", "smtplib", "torch.distributed.rpc", "torch.hub", "torch.utils.cpp_extension", "torch.utils.model_zoo",
    }
)  # fmt: skip
"""Modules, but not what lies below them: a package of a user's own may be called ``imp`` or ``nt``.
Names that are likely in a user's own module of the same name (``code``, ``test``) stand below."""

_DANGEROUS_NAMES = frozenset(
    {f"{module}.{name}" for module in ("builtins", "__builtin__")
     for name in ("eval", "exec", "execfile", "compile", "open", "file", "input", "raw_input", "__import__",
                  "apply", "reload", "breakpoint", "globals", "locals", "vars", "setattr", "delattr",
                  "exit", "quit", "help")}
    | {f"{module}.{name}" for module in ("io", "_io") for name in ("FileIO", "open", "open_code")}
    | {f"{module}.{name}" for module in ("operator", "_operator") for name in ("attrgetter", "methodcaller")}
    | {"code.InteractiveConsole", "code.InteractiveInterpreter", "code.interact", "functools.reduce",
       "_functools.reduce", "multiprocessing.util.spawnv_passfds", "numpy.core.records.fromfile",
       "numpy._core.records.fromfile", "numpy.f2py.crackfortran.myeval", "numpy.fromfile", "numpy.load",
       "numpy.loadtxt", "numpy.savetxt", "numpy.testing.runstring", "numpy.testing._private.utils.runstring",
       "platform.popen", "profile.run", "cProfile.run", "tempfile.mktemp", "trace.Trace", "types.CodeType",
       "types.FunctionType", "doctest.debug_script", "uuid._get_command_stdout",
       # Of torch: what unpickles, imports, evaluates text or runs a program.
       "torch.load", "torch.save", "torch.serialization.load", "torch.storage._load_from_bytes", "torch.jit.load",
       "torch._dynamo.guards.GuardBuilder.get", "torch._inductor.codecache.compile_file",
       "torch._ops._Ops.load_library", "torch._utils._import_dotted_name",
       "torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression",
       "torch.jit.unsupported_tensor_ops.execWrapper", "torch.package.PackageImporter",
       "torch.package.package_importer.PackageImporter", "torch.utils._config_module.ConfigModule.load_config",
       "torch.utils.bottleneck.__main__.run_autograd_prof", "torch.utils.bottleneck.__main__.run_cprofile",
       "torch.utils.collect_env.run", "torch.utils.data.datapipes.utils.decoder.basichandlers"}
)  # fmt: skip

_DANGEROUS_PREFIXES = ("numpy.distutils.", "pandas.io.", "setuptools.command.", "setuptools.sandbox.")


def _is_dangerous(name: Global) -> bool:
    parts = name.name.split(".")
    return (
        name.module.split(".", 1)[0] in _DANGEROUS_PACKAGES
        or name.module in _DANGEROUS_MODULES
        or name.qualified in _DANGEROUS_NAMES
        or name.qualified.startswith(_DANGEROUS_PREFIXES)
        # A module reached as an attribute of another, and attribute chains into internals.
        or any(part in _DANGEROUS_PACKAGES or (part.startswith("__") and part.endswith("__")) for part in parts)
    )


def assess(name: Global) -> GlobalUse:
    """The verdict on one name."""
    qualified = name.qualified
    verdict: Literal["torch", "allowed", "unknown", "dangerous"] = "unknown"
    if qualified in _TORCH_NAMES or _REBUILD.fullmatch(qualified):
        verdict = "torch"
    elif qualified in _ALLOWED:
        verdict = "allowed"
    elif _is_dangerous(name):
        verdict = "dangerous"
    return GlobalUse(name=qualified, verdict=verdict, count=max(name.calls, 1))


def global_uses(names: Iterable[Global]) -> tuple[GlobalUse, ...]:
    """The verdicts on all names, in order of appearance."""
    return tuple(assess(name) for name in names)

"""Names that run, import, open or reach out, however they are spelled.

Executing a pickle calls the functions it names, with arguments it chooses.  So a module is listed here
when a function in it runs a program or text, imports, loads native code, unpickles, opens or removes
files, or talks to the network, and no checkpoint needs a name from it.  Sources: the block lists of
picklescan, modelscan and fickling, the bypasses reported against them, and the standard library's
own modules read for such functions.

No list of this kind is complete, which is why a name that is not on it is *unknown*, not safe.
What honest checkpoints name (``argparse.Namespace``, ``pathlib.PosixPath``, ``functools.partial``,
``distutils.version.LooseVersion``, numpy's reconstructors) is left out with care: packages are listed
only where a user's own package of that name is improbable; else the single module or name is.
"""

from __future__ import annotations

import unicodedata
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING

__all__ = ["is_dangerous", "is_dangerous_attribute", "is_kept_code", "makes_function"]


def _words(text: str) -> list[str]:
    return text.split()


_PACKAGES = frozenset(
    _words("""
    _aix_support _bootsubprocess _ctypes _frozen_importlib _frozen_importlib_external _imp _osx_support _pickle
    _posixshmem _posixsubprocess _pyrepl _socket _sqlite3 _ssl _testcapi _testinternalcapi _thread _winapi
    _xxsubinterpreters antigravity asynchat asyncio asyncore atexit bdb cPickle cProfile cgitb codeop compileall
    crypt ctypes dbm doctest ensurepip faulthandler fileinput ftplib gc gdbm http httplib idlelib imaplib importlib
    lib2to3 linecache mailbox mailcap marshal mmap modulefinder netrc nntplib ntpath nturl2path os pdb pickle
    pickletools pipes pkgutil poplib posix posixpath pstats pty pwd py_compile pyclbr pydoc readline rlcompleter
    runpy shelve shutil signal site sitecustomize smtpd smtplib socket socketserver spwd sqlite3 ssl subprocess
    symtable sys sysconfig syslog tabnanny tarfile telnetlib tempfile termios timeit tkinter turtle turtledemo
    unittest urllib usercustomize uu venv webbrowser winreg wsgiref xmlrpc zipapp zipfile zipimport

    dumbdbm dummy_thread popen2 urllib2 xmlrpclib

    Cython IPython Pyro4 aiohttp cffi cloudpickle dill eventlet execnet fabric fsspec gevent httpx ipykernel joblib
    jsonpickle paramiko pexpect pickle5 pip plumbum psutil ptyprocess pyximport requests rpyc srsly twisted urllib3
    virtualenv zerorpc

    _dbm _gdbm _interpchannels _interpqueues _interpreters _lsprof _msi _overlapped _remote_debugging _scproxy _signal
    _tkinter _xxinterpchannels _xxinterpqueues adlfs annotationlib asteval boto3 botocore bpython cgi delegator envoy
    fickling gcsfs gdown importlib_metadata ipdb jinja2 jupyter_client llvmlite mako modelscan msilib nbconvert nose
    numexpr papermill picklescan psycopg2 ptpython pudb pymongo pymysql RestrictedPython s3fs simpleeval smart_open
    stevedore websockets wget
    """)
)
"""Top-level modules with all below them: of the standard library, of Python 2, of others."""

_HONEST = frozenset(
    {"http.HTTPStatus", "http.HTTPMethod", "signal.Signals", "signal.Handlers"}
    | {f"{module}.{name}" for module in ("copyreg", "copy_reg") for name in ("__newobj__", "__newobj_ex__")}
    | {"builtins.__main__", "__builtin__.__main__"}
    | {f"{joblib}.{module}.{name}" for joblib in ("joblib", "sklearn.externals.joblib")
       for module in ("numpy_pickle", "numpy_pickle_compat")
       for name in ("NDArrayWrapper", "NumpyArrayWrapper", "ZNDArrayWrapper")}
)  # fmt: skip
"""From packages that are otherwise listed: enumerations, plain objects, array types."""

_PLAIN_CLASSES = ("torch._dynamo.", "torch.testing._internal.")
"""Their classes are plain ones, which honest files have; everything else in them is as listed."""

_CORE = frozenset(
    _words("""
    __builtin__ __builtins__ _posixsubprocess builtins cPickle cloudpickle ctypes dill importlib joblib marshal os
    pickle pkgutil posix pty runpy shutil socket subprocess sys webbrowser
    """)
)
"""Modules that other modules have as attributes or re-export (``six.moves.builtins``, ``numpy.os``), with names that no
package uses for its own."""

_MODULES = frozenset(
    _words("""
    _osx_support _pyrepl.pager builtins.code code.code commands curses distutils._msvccompiler distutils.ccompiler
    distutils.core distutils.cygwinccompiler distutils.dir_util distutils.dist distutils.file_util
    distutils.msvccompiler distutils.spawn distutils.sysconfig distutils.unixccompiler distutils.util git.cmd git.repo
    git.repo.base imp keras.saving logging.config logging.handlers multiprocessing.connection multiprocessing.dummy
    multiprocessing.forkserver multiprocessing.managers multiprocessing.pool multiprocessing.process
    multiprocessing.reduction multiprocessing.resource_sharer multiprocessing.spawn multiprocessing.util nt
    numpy.ctypeslib numpy.lib._datasource numpy.lib._npyio_impl numpy.lib.npyio pandas.compat.pickle_compat pytest
    resource ruamel.yaml.constructor ruamel.yaml.loader ruamel.yaml.main scipy.io six.moves.builtins test.support thread
    timeit yaml.constructor yaml.loader
    """)
)
"""Modules, but not what is below them: a package of a user's own may be called ``imp`` or ``nt``."""

_PREFIXES = tuple(
    _words("""
    accelerate.commands. accelerate.launchers. accelerate.utils.launch. concurrent.futures. concurrent.interpreters.
    cupy.cuda.compiler. curses. datasets.load. deepspeed.launcher. deepspeed.ops.op_builder. detectron2.config.lazy.
    detectron2.utils.env. distutils.command. huggingface_hub.file_download. hydra._internal. hydra.core.plugins.
    hydra.core.utils. hydra.experimental. hydra.main hydra.utils. jax.experimental.serialize_executable. keras.saving.
    keras.src.saving. keras.src.utils.python_utils. langchain.load. langchain_core.load. langchain_experimental.
    mlflow.pyfunc. multiprocessing.context. multiprocessing.heap. multiprocessing.popen_
    multiprocessing.resource_tracker. multiprocessing.set_ multiprocessing.shared_memory. multiprocessing.sharedctypes.
    networkx.read_ networkx.readwrite. networkx.write_ nltk.data. nltk.downloader. numba.core.serialize. numba.pycc.
    numpy._pytesttester. numpy.compat.py3k. numpy.ctypeslib. numpy.distutils. numpy.f2py. numpy.testing. onnx.hub.
    optparse.Values. paddle.framework.io. pandas._testing. pandas.core.computation. pandas.io. pandas.read_
    PIL.ImageGrab. PIL.ImageMath. PIL.ImageShow. pkg_resources.load_ pkg_resources.run_ platform._
    pydantic._internal._typing_extra. pyspark.serializers. ray.cloudpickle. scipy.io. setuptools._distutils.command.
    setuptools._distutils.core. setuptools._distutils.file_util. setuptools._distutils.spawn. setuptools.command.
    setuptools.sandbox. sklearn.datasets. sklearn.externals.joblib. sympy.core.sympify. sympy.external.importtools.
    sympy.interactive. sympy.parsing. sympy.plotting. sympy.printing.preview. sympy.testing.
    sympy.utilities._compilation. sympy.utilities.autowrap. sympy.utilities.lambdify. sympy.utilities.runtests.
    sympy.utilities.source. tensorflow.io. tensorflow.python.lib.io. tensorflow.saved_model. test.support.
    torchvision.datasets.utils. transformers.agents. transformers.commands. transformers.dynamic_module_utils.
    transformers.tools. transformers.utils.hub. ultralytics.utils.checks. ultralytics.utils.downloads. uuid._
    xml.dom.domreg.

    torch._appdirs. torch._dynamo.aot_compile torch._dynamo.bytecode_debugger. torch._dynamo.debug_utils.
    torch._dynamo.functional_export. torch._dynamo.guards. torch._dynamo.package. torch._dynamo.pgo.
    torch._dynamo.repro. torch._export. torch._functorch._aot_autograd.codegen. torch._functorch.compilers.
    torch._inductor. torch._logging._internal. torch._precompile. torch._strobelight. torch._vendor.
    torch._weights_only_unpickler. torch.backends.xeon. torch.cuda._memory_viz. torch.cuda.tunable.
    torch.distributed.checkpoint.format_utils. torch.distributed.checkpoint.state_dict_loader.
    torch.distributed.elastic. torch.distributed.launch. torch.distributed.launcher.
    torch.distributed.nn.jit.instantiator. torch.distributed.rpc. torch.distributed.run. torch.export._draft_export.
    torch.export.load torch.export.pt2_archive. torch.fx._graph_pickler. torch.fx.graph_module._ torch.hub.
    torch.jit._serialization. torch.jit.mobile. torch.multiprocessing. torch.package. torch.testing._internal.
    torch.utils._config_module. torch.utils._cpp_extension_versioner. torch.utils.benchmark. torch.utils.bottleneck.
    torch.utils.collect_env. torch.utils.cpp_extension. torch.utils.data.datapipes.utils. torch.utils.file_baton.
    torch.utils.model_zoo. torch.utils.show_pickle.
    """)
)
"""How qualified names begin."""

_NAMES = frozenset(
    {f"builtins.{name}" for name in (
        "eval", "exec", "execfile", "compile", "open", "file", "input", "raw_input", "__import__", "apply", "reload",
        "breakpoint", "globals", "locals", "vars", "setattr", "delattr", "exit", "quit", "help", "copyright", "credits",
        "license")}
    | {f"{module}.{name}" for module in ("io", "_io", "_pyio", "codecs", "gzip", "bz2", "lzma")
       for name in ("FileIO", "open", "open_code", "GzipFile", "BZ2File", "LZMAFile", "OpenWrapper", "register")}
    | {f"{module}.{name}" for module in ("operator", "_operator") for name in ("attrgetter", "methodcaller")}
    | {f"types.{name}" for name in ("ModuleType", "coroutine", "new_class")}
    | {f"code.{name}" for name in ("InteractiveConsole", "InteractiveInterpreter", "compile_command", "interact")}
    | {f"{module}.{name}" for module in ("profile", "trace") for name in ("Profile", "Trace", "run", "runctx", "main")}
    | {f"pandas.{name}" for name in (
        "eval", "read_pickle", "read_csv", "read_excel", "read_hdf", "read_html", "read_json", "read_sql", "read_table",
        "HDFStore", "ExcelFile", "ExcelWriter")}
    | {f"{module}.{name}" for module in ("numpy", "numpy.lib", "numpy.core.records", "numpy._core.records", "numpy.rec",
                                         "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.memmap",
                                         "numpy._core.memmap", "numpy.lib.utils", "numpy.lib.format")
       for name in ("DataSource", "exec_mod_from_location", "fromfile", "genfromtxt", "load", "loadtxt", "memmap",
                    "open_memmap", "safe_eval", "save", "savetxt", "savez", "savez_compressed")}
    | {f"yaml.{name}" for name in ("full_load", "load", "load_all", "unsafe_load", "unsafe_load_all")}
    | {f"{module}.Lambda" for module in (
        "keras.layers", "keras.layers.core.lambda_layer", "keras.src.layers.core.lambda_layer",
        "tensorflow.keras.layers")}
    | {f"torch.{name}" for name in (
        "_utils._import_dotted_name", "compile", "from_file", "load", "save", "serialization.load",
        "serialization._load", "serialization._legacy_load", "serialization.save", "storage._load_from_bytes",
        "jit.load", "jit.save",
        "jit.jit_module_from_flatbuffer", "jit.unsupported_tensor_ops.execWrapper", "ops.load_library",
        "classes.load_library", "_ops._Ops.load_library", "utils._config_module.ConfigModule.load_config",
        "fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression", "fx._forward_from_src",
        "fx.graph_module.reduce_package_graph_module", "fx.graph_module.reduce_deploy_graph_module",
        "utils.data.datapipes.utils.decoder.basichandlers", "set_default_tensor_type", "library.Library")}
    | {"click.edit", "click.launch", "copyreg.add_extension", "copyreg.constructor", "copyreg.pickle",
       "dataclasses._create_fn", "dataclasses.make_dataclass", "functools.reduce", "_functools.reduce", "git.Git",
       "git.Repo", "inspect.currentframe", "inspect.stack", "keras.models.load_model", "keras.utils.get_file",
       "logging.FileHandler", "logging.basicConfig", "multiprocessing.Pool", "multiprocessing.Process",
       "past.builtins.execfile", "platform.popen", "platform._syscmd_file", "tensorflow.keras.models.load_model",
       "tensorflow.keras.utils.get_file", "tensorflow.load_library", "tensorflow.load_op_library",
       "tensorflow.raw_ops.ReadFile", "tensorflow.raw_ops.WriteFile", "threading.Thread", "threading.Timer",
       "transformers.pipeline", "typing._eval_type", "typing.get_type_hints", "weakref.finalize",
       "xml.etree.ElementTree.parse"}
    | {f"{module}.{name}.{method}" for module in ("pathlib", "pathlib._local", "pathlib._abc")
       for name in ("Path", "PosixPath", "WindowsPath")
       for method in _words("""chmod copy copy_into glob hardlink_to iterdir lchmod mkdir move open read_bytes read_text
                               rename replace rglob rmdir symlink_to touch unlink walk write_bytes write_text""")}
    | {f"sympy.{name}" for name in _words("""N S apart autowrap cancel cse diff doctest expand factor integrate lambdify
                                             limit nsimplify parse_expr parsing preview simplify solve solveset sympify
                                             test together ufuncify core.singleton.S""")}
    | {f"multiprocessing.{name}" for name in _words("""Array JoinableQueue Manager Pipe Queue RawArray RawValue
                                                       SimpleQueue Value get_context""")}
    | {f"{module}.{name}" for module in ("pandas.DataFrame", "pandas.core.frame.DataFrame")
       for name in ("eval", "query")}
    | {f"{module}.{name}" for module in ("omegaconf.OmegaConf", "omegaconf.omegaconf.OmegaConf")
       for name in ("load", "register_new_resolver", "register_resolver", "legacy_register_resolver", "save")}
    | {f"torch._C.{name}" for name in _words("""PyTorchFileReader PyTorchFileWriter _import_ir_module_from_package
       _load_for_lite_interpreter _load_for_lite_interpreter_from_buffer _load_jit_module_from_bytes
       _load_jit_module_from_file _load_mobile_module_from_bytes _load_mobile_module_from_file _save_jit_module
       _save_mobile_module import_ir_module import_ir_module_from_buffer""")}
    | {f"torch.{name}" for name in _words("""_dynamo.convert_frame.replay _dynamo.symbolic_convert._import_module
       _dynamo.trace_rules._load_obj_from_str _dynamo.utils.import_submodule _ops._Ops.import_module
       cuda.memory._dump_snapshot distributed.checkpoint.load distributed.distributed_c10d._tensor_to_object
       export._unlift._convert_guards_code_to_fn fx.experimental.rewriter.AST_Rewriter.rewrite
       fx.experimental.symbolic_shapes.ShapeEnv.deserialize_symexpr
       fx.experimental.symbolic_shapes.ShapeEnv.evaluate_symexpr fx.operator_schemas._torchscript_type_to_python_type
       jit.CompilationUnit jit.annotations._eval_no_call jit.frontend.build_ignore_context_manager""")}
    | set(_words("""
       PIL.Image.open attr._make._eval_snippets attr.make_class attrs.make_class compression.bz2.open
       compression.gzip.open compression.lzma.open compression.zstd.open cupy.RawKernel cupy.RawModule
       dataclasses._FuncBuilder dataclasses._is_type datasets.load_dataset datasets.load_from_disk
       detectron2.config.LazyConfig encodings.search_function gensim.utils.unpickle gettext.Catalog
       gettext.GNUTranslations gettext.c2py gettext.find gettext.install gettext.translation h5py.File
       huggingface_hub.hf_hub_download huggingface_hub.snapshot_download hydra.compose hydra.initialize
       inspect._signature_fromstr inspect.get_annotations keras.layers.deserialize mxnet.nd.load nltk.download
       numpy._core._methods._dump numpy.add_newdoc numpy.core._methods._dump numpy.lib._utils_impl.safe_eval
       numpy.lib.add_newdoc numpy.test onnx.load onnxruntime.InferenceSession paddle.load
       pkg_resources.EntryPoint polars.read_csv pyarrow.deserialize pyarrow.serialize pydantic.ImportString
       pydantic.PyObject ruamel.yaml.YAML.load ruamel.yaml.load setuptools.setup spacy.load sqlalchemy.create_engine
       string.Formatter.get_field sunau.open tensorflow.numpy_function tensorflow.py_function
       tensorflow.python.ops.script_ops.py_func threading.setprofile threading.settrace tokenize.open
       trace.CoverageResults tracemalloc.Snapshot.dump tracemalloc.Snapshot.load typing.ForwardRef.evaluate
       typing.evaluate_forward_ref typing_extensions.evaluate_forward_ref typing_extensions.get_type_hints
       ultralytics.nn.tasks.attempt_load_one_weight ultralytics.nn.tasks.attempt_load_weights
       ultralytics.nn.tasks.torch_safe_load wandb.init warnings._getcategory wave.open xml.dom.getDOMImplementation
       xml.dom.minidom.parse xml.dom.pulldom.parse xml.etree.ElementTree.iterparse xml.sax._create_parser
       xml.sax.make_parser xml.sax.parse
       """))
)  # fmt: skip
"""Single names, with all below them (``builtins.open`` and ``codecs.open.anything``)."""

_ANYWHERE = frozenset(
    _words("""
    __import__ _evaluate _start_joinable_thread _start_new_thread CDLL check_call check_output deserialize_keras_object
    exec exec_module execfile execl execle execlp execv execve execvp func_load getoutput getstatusoutput
    import_from_string import_module import_modules_from_strings import_object import_string load_library load_module
    load_op_library model_from_config model_from_json model_from_yaml Popen popen run_module run_path spawnl spawnle
    spawnlp spawnv spawnve spawnvp start_new_thread symbol_by_name urlopen urlretrieve
    """)
)
"""Functions that keep their name in every module that imports or wraps them."""

_ATTRIBUTES = frozenset(
    _words("""
    _new_shared_filename_cpu _new_using_filename_cpu _write_file from_file from_pretrained fromfile load_from_checkpoint
    memmap to_pickle tofile
    """)
)
"""Methods that open, write or fetch files: of storages and tensors, of numpy arrays, of transformers' classes."""


_CODE_TYPES = frozenset({"CodeType", "FunctionType", "LambdaType"})
_MAKES_FUNCTIONS = frozenset({"_create_function", "_fill_function", "_make_function", "_make_skel_func"})
_MAKES_CODE = frozenset(
    _words("""
    _builtin_type _cell_set _class_setstate _create_array _create_cell _create_code _create_dtypemeta _create_lock
    _create_namedtuple _create_rlock _create_stringi _create_stringo _create_type _create_weakproxy _create_weakref
    _dill _empty_cell_value _function_setstate _gen_ellipsis _gen_not_implemented _get_attr _getattribute _import_module
    _load_type _make_cell _make_dict_items _make_dict_keys _make_dict_values _make_empty_cell _make_skeleton_class
    _make_skeleton_enum _make_typevar _rehydrate_skeleton_class _setattr _setitems dynamic_subimport subimport
    """)
)
"""What cloudpickle and dill call to make functions, classes and what they close over; `ckptkit.pickling.calls` looks at
what they are given."""

_MAX_PARTS = 64
"""Parts of a dotted name: the deepest packages and classes have about twelve."""


def is_dangerous(module: str, name: str) -> bool:
    """Whether a name runs, imports, opens or reaches out.

    Args:
        module: as the pickle spells it; Python 2's are understood.
        name: in the module; with dots it is an attribute of an attribute.
    """
    if not (module.isascii() and name.isascii()):
        # Python does not fold these when it looks a name up; a reader would.
        module, name = unicodedata.normalize("NFKC", module), unicodedata.normalize("NFKC", name)
    if name.endswith(".__new__"):
        name = name.removesuffix(".__new__")  # makes an object of the class, as NEWOBJ does
    if _is_listed(module, name):
        return True
    # As CPython's unpickler translates it for protocols 0 to 2 (Lib/_compat_pickle.py).
    renamed = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return renamed != (module, name) and _is_listed(*renamed)


def _is_listed(module: str, name: str) -> bool:
    qualified = f"{module}.{name}"
    if qualified in _HONEST:
        return False
    folders, attributes = module.split("."), name.split(".")
    if len(folders) + len(attributes) > _MAX_PARTS:
        return True
    is_plain = qualified.startswith(_PLAIN_CLASSES) and attributes[-1].lstrip("_")[:1].isupper()
    if folders[0] in _PACKAGES or (qualified.startswith(_PREFIXES) and not is_plain):
        return True
    # A module that is an attribute of another: "six.moves.builtins", or "torch.serialization" and "os.system".
    if any(folder in _CORE for folder in folders[1:]) or not _ANYWHERE.isdisjoint(attributes):
        return True
    if any(map(is_dangerous_attribute, attributes)) or any(part in _PACKAGES for part in attributes[:-1]):
        return True
    path = ""
    for count, part in enumerate((*folders, *attributes), 1):
        path = f"{path}.{part}" if path else part
        if path in _NAMES or (path in _MODULES and len(folders) <= count < len(folders) + len(attributes)):
            return True
    return False


def is_kept_code(module: str, name: str) -> bool:
    """Whether a name is what cloudpickle and dill make functions and classes of that they keep by their code."""
    if module == "types":
        return name in _CODE_TYPES
    folders, name = module.split("."), name.removeprefix("_dill.").removeprefix("cloudpickle.")
    return ("cloudpickle" in folders or folders[0] == "dill") and (name in _MAKES_FUNCTIONS or name in _MAKES_CODE)


def makes_function(module: str, name: str) -> bool:
    """Whether what such a name gives is a function."""
    functions = (*_MAKES_FUNCTIONS, "FunctionType", "LambdaType", "_builtin_type", "_load_type")
    return is_kept_code(module, name) and name.rpartition(".")[2] in functions


def is_dangerous_attribute(name: str) -> bool:
    """Whether an attribute, of any object, is a module of that kind, an internal, or opens files."""
    if name.startswith("__") and name.endswith("__"):
        return True
    return name.lstrip("_") in _CORE or name in _CORE or name in _ATTRIBUTES

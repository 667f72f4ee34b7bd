"""Names that run, import, open or reach out, in whatever spelling: none may pass as merely unknown."""

from __future__ import annotations

import pytest

from ckptkit.pickling.inert import Global
from ckptkit.pickling.trust import assess


def words(text: str) -> list[str]:
    return text.split()


STANDARD = words(
    """
    _aix_support._read_cmd_output _ctypes.dlopen _io.FileIO _io.open_code _operator.attrgetter
    _osx_support._find_build_tool _osx_support._read_output _pickle.loads _posixsubprocess.fork_exec
    _pyrepl.pager.pipe_pager _thread.start_new_thread antigravity.webbrowser asyncio.run asyncio.subprocess.Process
    asyncio.unix_events._UnixSubprocessTransport._start atexit.register bdb.Bdb.run builtins.__import__
    builtins.breakpoint builtins.compile builtins.eval builtins.exec builtins.exit builtins.globals builtins.help
    builtins.input builtins.open builtins.setattr builtins.vars bz2.BZ2File cProfile.run cProfile.runctx
    code.InteractiveInterpreter code.interact codecs.open codeop.compile_command compileall.compile_dir
    concurrent.futures.process.ProcessPoolExecutor copyreg.add_extension ctypes.CDLL ctypes.util.find_library
    dataclasses._create_fn dataclasses.make_dataclass dbm.open distutils.command.install.install
    distutils.core.run_setup distutils.file_util.write_file distutils.spawn.spawn doctest.debug_script
    doctest.testfile ensurepip._run_pip ensurepip.bootstrap faulthandler.dump_traceback fileinput.input ftplib.FTP
    functools.reduce gc.get_objects gzip.open http.client.HTTPSConnection http.server.test
    idlelib.autocomplete.AutoComplete.get_entity idlelib.pyshell.ModifiedInterpreter.runcode
    idlelib.run.Executive.runcode imaplib.IMAP4_stream importlib.import_module importlib.machinery.SourceFileLoader
    importlib.util.find_spec inspect.currentframe io.FileIO io.open lib2to3.pgen2.grammar.Grammar.loads
    lib2to3.pgen2.pgen.ParserGenerator.make_label linecache.getlines logging.FileHandler logging.config.dictConfig
    logging.config.listen logging.handlers.SocketHandler marshal.loads mmap.mmap modulefinder.ModuleFinder
    multiprocessing.Process multiprocessing.pool.Pool multiprocessing.popen_fork.Popen
    multiprocessing.util.spawnv_passfds nntplib.NNTP nt.system operator.attrgetter operator.methodcaller
    os.path.join os.popen os.remove os.system pdb.run pdb.set_trace pickle.Unpickler pickle.loads
    pkgutil.resolve_name platform.popen poplib.POP3 posix.system posixpath.join profile.Profile profile.run
    pstats.Stats pty.spawn py_compile.compile pydoc.browse pydoc.locate pydoc.pipepager readline.read_init_file
    runpy._run_code runpy.run_path shelve.open shutil.move shutil.rmtree signal.signal site.execsitecustomize
    site.main smtplib.SMTP socket.create_connection socket.socket sqlite3.connect sqlite3.dbapi2.connect
    ssl.get_server_certificate subprocess.Popen subprocess.check_output sys.exit sys.modules sys.settrace
    sysconfig.get_platform tarfile.open telnetlib.Telnet tempfile.NamedTemporaryFile tempfile.mktemp
    test.support.script_helper.assert_python_ok threading.Thread timeit.Timer timeit.main timeit.timeit tkinter.Tcl
    trace.Trace trace.Trace.runctx typing.get_type_hints
    unittest.loader.TestLoader unittest.main unittest.mock._importer urllib.request.urlopen
    urllib.request.urlretrieve uuid._get_command_stdout uuid._ifconfig_getter venv.create venv.main weakref.finalize
    webbrowser.open xml.etree.ElementTree.parse xmlrpc.client.ServerProxy zipfile.ZipFile zipimport.zipimporter
    """
)
OTHERS = words(
    """
    Cython.Build.Inline.cython_inline IPython.start_ipython IPython.utils.process.system aiohttp.ClientSession
    aiohttp.client.ClientSession cffi.FFI cloudpickle.dumps cloudpickle.loads
    dill._dill._create_filehandle dill._dill._eval_repr dill.loads
    fabric.Connection fsspec.open git.Repo git.cmd.Git httpx.get joblib.load
    jsonpickle.decode keras.layers.Lambda keras.models.load_model keras.saving.load_model numpy.DataSource
    numpy._core.records.fromfile numpy.compat.py3k.npy_load_module numpy.core.records.fromfile
    numpy.ctypeslib.load_library numpy.distutils.exec_command.exec_command numpy.f2py.crackfortran._eval_length
    numpy.f2py.crackfortran.myeval numpy.f2py.diagnose.run_command numpy.fromfile numpy.lib._datasource.open
    numpy.lib.npyio.load numpy.load numpy.memmap numpy.testing._private.nosetester.NoseTester
    numpy.testing._private.utils.runstring numpy.testing.measure numpy.testing.runstring
    pandas.core.computation.eval.eval pandas.eval pandas.io.pickle.read_pickle pandas.read_pickle paramiko.SSHClient
    past.builtins.execfile pexpect.spawn pickle5.loads pip._internal.cli.main.main pip._internal.main
    pip._vendor.distlib.util.subprocess pip.main pkg_resources.load_entry_point pkg_resources.run_script
    psutil.Popen requests.api.get requests.get scipy.io.loadmat setuptools.command.install.install
    setuptools.sandbox.run_setup six.moves.builtins.eval six.moves.cPickle.loads six.moves.urllib.request.urlopen
    sklearn.datasets.load_files sklearn.externals.joblib.load tensorflow.io.gfile.GFile tensorflow.io.write_file
    tensorflow.keras.layers.Lambda tensorflow.load_op_library torch.FloatStorage._write_file torch.Tensor.tofile
    torch.UntypedStorage.from_file torch._dynamo.guards.GuardBuilder.get torch._dynamo.repro.after_dynamo.run_repro
    torch._inductor.codecache.PyCodeCache.load torch._inductor.codecache.compile_file torch._ops._Ops.load_library
    torch._utils._import_dotted_name torch._weights_only_unpickler.load torch.classes.load_library
    torch.distributed.elastic.multiprocessing.start_processes torch.distributed.launch.main
    torch.distributed.rpc.init_rpc torch.distributed.rpc.rpc_sync torch.distributed.run.main torch.export.load
    torch.from_file torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression
    torch.fx.graph_module._exec_with_source torch.fx.graph_module._forward_from_src
    torch.fx.graph_module.reduce_package_graph_module torch.hub._load_local torch.hub.load
    torch.hub.load_state_dict_from_url torch.jit._serialization.load torch.jit.load
    torch.jit.unsupported_tensor_ops.execWrapper torch.load torch.multiprocessing.spawn torch.ops.load_library
    torch.package.PackageImporter torch.package.package_importer.PackageImporter torch.save
    torch.serialization._legacy_load torch.serialization.load torch.storage._load_from_bytes
    torch.testing._internal.common_utils.shell torch.utils._config_module.ConfigModule.load_config
    torch.utils.benchmark.Timer torch.utils.bottleneck.__main__.run_cprofile torch.utils.collect_env.run
    torch.utils.collect_env.run_and_return_first_line torch.utils.cpp_extension.load
    torch.utils.cpp_extension.load_inline torch.utils.data.datapipes.utils.decoder.basichandlers
    torch.utils.file_baton.FileBaton torch.utils.model_zoo.load_url torch.utils.show_pickle.main
    transformers.dynamic_module_utils.get_class_from_dynamic_module
    transformers.modeling_utils.PreTrainedModel.from_pretrained transformers.pipeline urllib3.PoolManager yaml.load
    yaml.unsafe_load
    """
)


LATER = words(
    """
    PIL.Image.open PIL.ImageMath.eval RestrictedPython.compile_restricted _interpchannels.recv _interpreters.exec
    _interpreters.run_string _xxinterpchannels.create accelerate.launchers.notebook_launcher
    annotationlib.call_evaluate_function asteval.Interpreter asyncio.unix_events.SelectorEventLoop attr.make_class
    boto3.client cgitb.enable compression.zstd.open concurrent.interpreters.create dataclasses._is_type
    datasets.load_dataset detectron2.config.LazyConfig.load encodings.search_function ensurepip.bootstrap
    fickling.hook.run_hook fickling.load gensim.utils.unpickle gettext.c2py gettext.translation h5py.File
    hydra._internal.utils._locate hydra.core.utils.setup_globals hydra.main hydra.utils.call hydra.utils.get_class
    hydra.utils.get_method hydra.utils.instantiate ipdb.set_trace jinja2.Template keras.layers.deserialize
    keras.models.model_from_json keras.utils.deserialize_keras_object lib2to3.pgen2.load
    lightning.pytorch.LightningModule.load_from_checkpoint mmengine.utils.import_modules_from_strings
    modelscan.modelscan.ModelScan multiprocessing.Manager multiprocessing.context.ForkProcess
    multiprocessing.context.SpawnContext.Pool multiprocessing.get_context multiprocessing.shared_memory.SharedMemory
    multiprocessing.sharedctypes.make_property networkx.read_gpickle networkx.readwrite.gpickle.read_gpickle
    networkx.write_gpickle numba.core.serialize._numba_unpickle numexpr.evaluate numexpr.necompiler.evaluate
    numpy.test omegaconf.OmegaConf.register_new_resolver onnx.load optparse.Values.read_file pandas.DataFrame.query
    pandas.read_orc papermill.execute_notebook pathlib.Path.unlink pathlib.PosixPath.write_bytes
    picklescan.scanner.scan_bytes pip._internal.commands.create_command platform._syscmd_ver pyarrow.deserialize
    pydantic.PyObject ruamel.yaml.load setuptools.setup spacy.load string.Formatter.get_field sympy.S sympy.lambdify
    sympy.parse_expr sympy.parsing.sympy_parser.eval_expr sympy.simplify sympy.sympify
    sympy.utilities.lambdify.lambdify tensorflow.py_function threading._start_joinable_thread
    threading._start_new_thread threading.settrace torch._C._load_jit_module_from_file torch._C.import_ir_module
    torch._dynamo.package.load_guards_state torch._dynamo.trace_rules._load_obj_from_str
    torch._dynamo.utils.import_submodule torch._functorch._aot_autograd.codegen._compile_and_exec_source
    torch._ops._Ops.import_module torch.distributed.checkpoint.format_utils.dcp_to_torch_save
    torch.distributed.nn.jit.instantiator.instantiate_non_scriptable_remote_module_template
    torch.export.pt2_archive._package.load_pt2 torch.fx._graph_pickler.GraphPickler.loads
    torch.jit.mobile._load_for_lite_interpreter torch.testing._internal.common_utils.run_tests
    torch.utils._config_module.ConfigModule torch.utils._config_module.install_config_module
    tracemalloc.Snapshot.load typing.ForwardRef._evaluate typing_extensions.evaluate_forward_ref wandb.init
    warnings._getcategory werkzeug.utils.import_string xml.sax.make_parser
    """
)


@pytest.mark.parametrize("qualified", [*STANDARD, *OTHERS, *LATER])
def test_names_that_run_import_open_or_reach_out(qualified: str) -> None:
    module, _, name = qualified.rpartition(".")
    assert assess(Global(module, name)).verdict == "dangerous"
    # The same name with the dots in the other half, as protocol 4 allows.
    module, _, name = qualified.partition(".")
    assert assess(Global(module, name)).verdict == "dangerous"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        # Python 2's names, which Python 3 translates.
        ("__builtin__", "eval"), ("__builtin__", "execfile"), ("__builtin__", "reduce"), ("commands", "getoutput"),
        ("cPickle", "loads"), ("urllib2", "urlopen"), ("thread", "start_new_thread"), ("_winreg", "OpenKey"),
        ("SocketServer", "TCPServer"), ("httplib", "HTTPConnection"), ("xmlrpclib", "ServerProxy"), ("dumbdbm", "open"),
        ("anydbm", "open"), ("os", "popen2"), ("popen2", "popen3"), ("imp", "load_source"), ("Tkinter", "Tk"),
        ("BaseHTTPServer", "HTTPServer"), ("UserDict", "os"), ("exceptions", "os.system"),
        # A module reached as an attribute of another.
        ("torch.serialization", "os.system"), ("torch.serialization", "os"), ("torch", "serialization.pickle.loads"),
        ("torch.os", "system"), ("numpy.os", "popen"), ("mine.utils", "np.os.popen"),
        ("unittest.mock", "builtins.eval"),
        ("random", "_os.system"), ("collections", "_sys.modules"), ("torch", "_utils.sys.modules.get"),
        ("torch", "serialization.tempfile.mktemp"), ("torch.utils.data", "_utils.worker.os.kill"), ("mine", "os"),
        # Internals.
        ("torch._utils", "_rebuild_tensor_v2.__globals__"), ("torch._utils", "_rebuild_tensor_v2.__globals__.get"),
        ("collections", "OrderedDict.__reduce__"), ("mine", "Net.__init__.__globals__"), ("mine", "__builtins__"),
        ("builtins", "__build_class__"), ("builtins", "object.__subclasses__"),
        # Letters that only look different, and names of more parts than any.
        ("\uff4f\uff53", "system"), ("builtins", "\uff45val"), ("mine", "a.\uff4fs.system"), ("a." * 40, "b." * 40),
        # Wrapped or imported by others under their own name.
        ("mine.shell", "Popen"), ("mine.shell", "check_output"), ("mine", "import_module"), ("mine", "urlretrieve"),
    ],
)  # fmt: skip
def test_whatever_the_spelling(module: str, name: str) -> None:
    assert assess(Global(module, name)).verdict == "dangerous"

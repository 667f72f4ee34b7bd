"""Every finding code: what it means and how to mend it.  ``ckptkit explain CODE`` prints it.

Codes are stable: scripts match on them.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CODES", "Explanation"]


class Explanation(NamedTuple):
    """The text behind a code."""

    title: str
    """What was seen, in a line."""
    meaning: str
    """Why it matters: what fails, and with which message."""
    remedy: str
    """What to do; ``-`` where nothing needs to be done."""


CODES: dict[str, Explanation] = {
    # What a file holds.
    "ambiguous-section": Explanation(
        "several sections hold weights",
        "The file holds more than one set of weights (a model and its EMA, a generator and a discriminator) and "
        "nothing in it says which one is meant. Taking one silently is how the wrong weights get deployed.",
        "Name one: ckptkit convert FILE OUT --section NAME. ckptkit inspect lists the names.",
    ),
    "bound-method": Explanation(
        "the method was saved instead of its result",
        "torch.save(model.state_dict, path) without parentheses pickles the method, and with it the whole model. "
        "Loading it needs the model's code and gives a function, not weights.",
        "The weights are there: ckptkit convert FILE OUT.safetensors writes them as a state_dict.",
    ),
    "whole-model": Explanation(
        "a pickled model, not a state_dict",
        "torch.load has to import the model's classes: without the exact source tree it fails with \"No module "
        'named ..." or "Can\'t get attribute ...", and with it, it runs the code the file names.',
        "ckptkit convert FILE OUT.safetensors writes its state_dict without needing the classes.",
    ),
    "wrapped-model": Explanation(
        "the model was saved inside DataParallel, DistributedDataParallel or torch.compile",
        "Every name begins with the wrapper's attribute, `module.` or `_orig_mod.`; the bare model does not know these "
        "names.",
        "ckptkit convert FILE OUT --strip-module",
    ),
    "no-tensors": Explanation(
        "the file holds no tensor",
        "It is a readable pickle of plain values or objects (arguments, a scheduler, a vocabulary) without weights.",
        "Look for the weights in another file of the release.",
    ),
    "training-state": Explanation(
        "training state takes space beside the weights",
        "Optimizer moments and the like are needed to resume training, not to run the model.",
        "ckptkit convert FILE OUT --weights-only writes the weights alone.",
    ),
    "not-a-plain-tensor": Explanation(
        "values of the state_dict that are no plain tensors",
        "Quantized, sparse and nested tensors, and the objects modules keep under `_extra_state`, cannot be described "
        "by dtype, shape and stride. They are kept as they are in .pth files; safetensors cannot hold them.",
        "Convert to .pth, or leave them out with --exclude and rebuild them in the program that loads the weights.",
    ),
    "not-a-model": Explanation(
        "a state_dict, not a model",
        "The file maps names to tensors. What torch.load returns has no eval() and cannot be called (\"'OrderedDict' "
        'object has no attribute ...").',
        "Build the model from its code, then model.load_state_dict(ckptkit.load_state_dict(FILE)).",
    ),
    "averaged-weights": Explanation(
        "averaged weights beside raw ones",
        "Training kept an exponential moving average (EMA) of the weights. Both have the same names and shapes; "
        "evaluation mostly used the average, and outputs of the two differ slightly.",
        "Choose one: ckptkit convert FILE OUT --section NAME",
    ),
    # Names and devices.
    "module-prefix": Explanation(
        "names carry a wrapper's prefix",
        "DataParallel and DistributedDataParallel put `module.` before every name, torch.compile `_orig_mod.`. "
        "load_state_dict then reports every key missing and every key unexpected; with strict=False it loads nothing.",
        "ckptkit convert FILE OUT --strip-module",
    ),
    "stale-versions": Explanation(
        "module versions are recorded under other names than the weights",
        "torch keeps each module's version in the state_dict's `_metadata` (BatchNorm's decides how "
        "num_batches_tracked is read). The names of the weights were changed without it, so torch takes every module "
        "for an old one.",
        "Change names with ckptkit convert (--strip-module, --rename and the like), which changes both.",
    ),
    "device-location": Explanation(
        "storages are tagged with an accelerator",
        "torch.load restores each storage to the device it was saved from, and on a machine without it fails with "
        '"Attempting to deserialize object on a CUDA device".',
        "ckptkit convert FILE OUT.pth --map-location cpu, or pass map_location when loading.",
    ),
    # Trust.
    "foreign-objects": Explanation(
        "objects of classes that are not torch's",
        'The pickle names classes beyond tensors and plain containers. torch.load refuses them by default ("Weights '
        'only load failed ... Unsupported global") or has to import and run them. This is common and not malicious.',
        "ckptkit reads the tensors without them: ckptkit convert FILE OUT.safetensors --weights-only",
    ),
    "other-system": Explanation(
        "objects tied to an operating system or a version of numpy",
        'Executing the pickle fails elsewhere: "cannot instantiate \'PosixPath\' on your system", "No module named '
        "'numpy._core'\". ckptkit makes none of these objects.",
        "ckptkit convert FILE OUT --weights-only leaves them out.",
    ),
    "hostile-name": Explanation(
        "the pickle names something that runs, imports or opens",
        "Executing this pickle, as torch.load(weights_only=False) would, calls a function no checkpoint needs.",
        "Do not load it. If you must have the weights, convert them with ckptkit, which executes nothing.",
    ),
    "crc-not-recorded": Explanation(
        "the archive carries no checksums",
        "Written with torch.serialization.set_crc32_options(False). Damage to the tensors cannot be seen.",
        "Converting with ckptkit records checksums of what is there now.",
    ),
    "no-checksums": Explanation(
        "the container has no checksums",
        "Files of torch before 1.6 record none. That all sizes agree and every byte is accounted for is checked; a "
        "changed bit inside a tensor cannot be seen.",
        "Converting with ckptkit records checksums of what is there now.",
    ),
    "unreferenced-records": Explanation(
        "records of the archive that nothing refers to",
        "torch reads only the storages that the pickle names. Others are dead weight, or were put there by another "
        "tool; a second pickle beside the first is never read by torch.load, but by whoever is told to.",
        "Converting writes only what the checkpoint uses.",
    ),
    # Programs.
    "torchscript-program": Explanation(
        "a TorchScript program, not a plain checkpoint",
        'torch.jit.save wrote it: weights together with the code that uses them. torch.load refuses it ("Cannot use '
        "weights_only=True with TorchScript archives\"), and the model's Python class is not needed to run it.",
        "torch.jit.load runs it; ckptkit convert FILE OUT.safetensors writes its weights.",
    ),
    "torchscript-without-code": Explanation(
        "a TorchScript program without its source",
        "What tells parameters from buffers is each class's source, which is missing. Tensors that require a gradient "
        "are taken for parameters, the others for buffers, plain attributes among them.",
        "-",
    ),
    "frozen-program": Explanation(
        "a frozen program: weights without names",
        "torch.jit.freeze and the mobile optimizer turn parameters into numbered constants of the code. There is no "
        "state_dict left to load into a model.",
        "Use the program it was frozen from. ckptkit inspect lists the constants with their shapes.",
    ),
    "foreign-program": Explanation(
        "compiled code beside the weights",
        "The archive holds libraries or programs built for one machine (AOTInductor, ExecuTorch). They are named, not "
        "read; whoever loads the archive runs them.",
        "Load it only if you trust where it came from.",
    ),
    "embedded-source": Explanation(
        "source text of the model's classes",
        "torch before 1.6 put the source of each nn.Module class into a file that holds a whole model, to warn when "
        "the class has changed since. It is text: nothing runs it. It may still show code and paths that were not "
        "meant for release.",
        "ckptkit convert FILE OUT.safetensors writes the weights without it.",
    ),
    "package-code": Explanation(
        "a torch.package archive with Python code",
        "PackageImporter runs the Python sources in the archive to make the objects it holds. Nothing of them is run "
        "here.",
        "ckptkit convert FILE OUT.safetensors --section NAME writes the weights alone.",
    ),
    # Memory.
    "tied-tensors": Explanation(
        "names that are the same tensor",
        "Tied parameters are one tensor under several names. ckptkit keeps them tied: in .pth as torch does, in "
        "safetensors as an alias in the metadata that safetensors' load_model and ckptkit understand.",
        "-",
    ),
    "shared-storage": Explanation(
        "different views of one storage",
        "Tensors that overlap or are slices of one buffer (cuDNN's flat RNN weights). They stay so in .pth; in "
        "safetensors each is written out on its own.",
        "-",
    ),
    "not-contiguous": Explanation(
        "tensors that are not contiguous",
        "Transposed weights are usual in ports from TensorFlow. Tools that copy a storage's bytes without its strides "
        "write them wrong.",
        "Converting to safetensors writes them out in order; the values stay.",
    ),
    "unused-bytes": Explanation(
        "storages are larger than the tensors that view them",
        "torch.save writes the whole storage even where a small view of it is all that is kept.",
        "Converting writes only what the tensors hold.",
    ),
    "big-endian": Explanation(
        "written on a big-endian machine",
        "Element bytes are in the reverse order of today's machines. They are turned round where values are written "
        "or loaded.",
        "-",
    ),
    # Shards and containers.
    "one-shard": Explanation(
        "one shard of several",
        "The file is one part of a checkpoint that was split; the other tensors lie in its other parts.",
        "Give the index: ckptkit inspect model.safetensors.index.json",
    ),
    "shard-extra-keys": Explanation(
        "shards hold tensors that the index does not list",
        "Loaders that go by the index leave them out, loaders that read whole shards take them. ckptkit takes them, "
        "after the listed ones.",
        "Writing one file settles it: ckptkit convert INDEX OUT.safetensors",
    ),
    "shard-total-size": Explanation(
        "the index states another total size than the shards have",
        "Loaders reserve memory by it. The index may belong to another version of the shards.",
        "Get index and shards from the same revision, or write the checkpoint anew.",
    ),
    "unaligned-data": Explanation(
        "tensor data is not aligned",
        "Elements begin at addresses that are no multiple of their width, as older writers left them. Every reader "
        "takes that; some copy each tensor, or run slower, for it.",
        "ckptkit convert FILE OUT.safetensors writes it aligned.",
    ),
    # Conversion.
    "left-out": Explanation(
        "parts of the source that the output does not hold",
        "What stood beside the weights (optimizer, scheduler, epoch, arguments) and was named to be left out, or of a "
        "program all but its weights. Training cannot be resumed from the output alone.",
        "Write a .pth without --weights-only and --leave-out to keep them.",
    ),
    "renamed": Explanation(
        "tensors were renamed",
        "The names in the output differ from the source's as the options asked; order and values do not.",
        "-",
    ),
    "nothing-renamed": Explanation(
        "the rules change no name",
        "No regular expression of --rename or --rename-file matches any name. Usually the names are others than was "
        "thought, or a prefix is missing from the expression.",
        "ckptkit inspect FILE --flat lists the names; --dry-run shows what each rule would do.",
    ),
    "nothing-to-strip": Explanation(
        "no name carries the prefix",
        "The prefix to strip does not occur at the beginning of any name; names are written as they are.",
        "-",
    ),
    "mixed-prefix": Explanation(
        "only some names carry the prefix",
        "Names with and without the prefix stand side by side; only those that carried it were changed. Often two "
        "models were merged, or a submodule alone was wrapped.",
        "Check the result against the model: ckptkit verify OUT --model REF",
    ),
    "dropped": Explanation(
        "tensors were left out of the output",
        "They match --exclude, or no --include. A model that has them does not load from the output with strict=True.",
        "Check the result against the model: ckptkit verify OUT --model REF --allow-missing GLOB",
    ),
    "nothing-excluded": Explanation(
        "a pattern of --exclude matches no name",
        "Nothing was dropped for it. Patterns are globs over whole names: `head` matches that one name alone, `head.*` "
        "all that begin with `head.`, and case counts.",
        "ckptkit inspect FILE --flat lists the names.",
    ),
    "written-out": Explanation(
        "views that were written out as tensors of their own",
        "safetensors stores contiguous tensors only; transposed, expanded and overlapping views hold the same values "
        "in the output, in their own bytes.",
        "-",
    ),
    "compacted": Explanation(
        "bytes that no tensor views were left behind",
        "torch.save writes whole storages, even where a small slice is all that is kept. The output's storages hold "
        "what tensors view of them; values, strides and sharing stay.",
        "-",
    ),
    "cast-overflow": Explanation(
        "values too large for the new dtype",
        "A cast made them infinity; in the float8 types without one, NaN or the largest value. One infinite weight can "
        "turn every output into NaN. float16 ends at 65,504; bfloat16 and float32 reach 3.4e38.",
        "Cast to bfloat16, or leave these tensors as they are: --keep-dtype GLOB",
    ),
    "cast-rounded": Explanation(
        "values that the new dtype does not have",
        "They were rounded to the nearest value of the new dtype, ties to even, as torch does; those too small for it "
        "became zero. Casting back does not bring them back.",
        "Compare the outputs of a forward pass: ckptkit verify OUT --model REF",
    ),
    # Verification.
    "fit-coverage": Explanation(
        "how much of the model the checkpoint fills",
        "Counts the reference's tensors that get a value from the file, and the share of parameter elements. "
        "Counters that torch makes itself do not count.",
        "-",
    ),
    "wrapper-prefix": Explanation(
        "the names carry a prefix too much, or too few",
        "DataParallel, torch.compile or an outer module put a prefix before every name. After the rename "
        "shown, most or all tensors fit.",
        "Run the convert command shown, or verify with --strip-module.",
    ),
    "identified": Explanation(
        "the reference model was found by the checkpoint's names and shapes",
        "No model was named, and a known architecture has exactly these names and shapes.  Others that fit alike are "
        "in what inspect prints.",
        "Name the model with --model where it must be a certain one.",
    ),
    "old-names": Explanation(
        "the names are those of another release of the library",
        "Layers are called otherwise today than when the file was made.  After the rename shown, most or all tensors "
        "fit.",
        "Run the convert command shown; it changes names alone.",
    ),
    "another-section": Explanation(
        "other weights in the same file fit the reference",
        "The file holds several sets of weights, such as raw ones and their moving average (EMA), or a generator and a "
        "discriminator; another than the selected one fits.",
        "Choose it with --section, as the command shown does.",
    ),
    "another-architecture": Explanation(
        "the checkpoint is of another model than the reference",
        "Its names and shapes are, every one, those of another model that torchvision or timm knows: a sibling of "
        "another depth or width, or another release of it.",
        "Verify it with the reference that the command shown names, or take the checkpoint that belongs to yours.",
    ),
    "other-weights": Explanation(
        "the file holds more weights than those that were verified",
        "Which of them are to be used is for the file's makers to say: moving averages (EMA) are usually the better "
        "ones.",
        "Verify the others too, with --section.",
    ),
    "nothing-matches": Explanation(
        "no tensor of the reference is in the checkpoint",
        "No name is shared and no prefix explains it: another architecture, or a reference without tensors. "
        "Allow patterns never silence it.",
        "Name the right reference, or the right --section.",
    ),
    "missing-keys": Explanation(
        "the reference has tensors the checkpoint lacks",
        "They would keep random values.",
        "Correct the reference or its arguments (aux_logits=False, say), or use --allow-missing GLOB where "
        "this is meant.",
    ),
    "unexpected-keys": Explanation(
        "the checkpoint has tensors the reference lacks",
        "A load with strict=False would drop them silently.",
        "Correct the reference or its arguments (aux_loss=True, say), or use --allow-unexpected GLOB where "
        "this is meant.",
    ),
    "shape-mismatch": Explanation(
        "same names, other shapes",
        "Where only a head differs, the layer and both sizes are named; else it is another variant of the model.",
        "Build the reference to fit: --model-arg num_classes=N.",
    ),
    "dtype-mismatch": Explanation(
        "the checkpoint's dtype is not the reference's",
        "Within one kind of number torch casts when loading, which may round. Between kinds (integers to "
        "floats, complex to real) values would change, and that is an error.",
        "--dtype checks in the file's own precision.",
    ),
    "unloadable-value": Explanation(
        "a value is no plain tensor",
        "The reference expects a tensor where the file holds a quantized, sparse or foreign object, which is "
        "not made from a file.",
        "Save that value as a dense tensor.",
    ),
    "extra-state": Explanation(
        "a module's extra state was not loaded",
        "What a module keeps under `_extra_state` is a Python object in the file and is never built; the "
        "model keeps its own.",
        "Set it in the factory if outputs depend on it.",
    ),
    "tied-restored": Explanation(
        "names restored from tied ones",
        "A name that the file lacks is, in the model, the same tensor as one it has: safetensors stores it once.",
        "-",
    ),
    "batch-counters": Explanation(
        "BatchNorm counters on one side alone",
        "`num_batches_tracked` is missing or extra in a layer both have. Evaluation does not use it, and a "
        "missing one counts as 0.",
        "-",
    ),
    "upgraded-keys": Explanation(
        "the reference's own code renamed or converted keys",
        "Modules upgrade older names and forms while they load.",
        "Saving the loaded model again writes the present ones.",
    ),
    "allowed-missing": Explanation(
        "names missing, as allowed",
        "They match --allow-missing and keep the reference's seeded initial values.",
        "-",
    ),
    "allowed-unexpected": Explanation(
        "names left over, as allowed",
        "They match --allow-unexpected and are not loaded.",
        "-",
    ),
    "not-loaded": Explanation(
        "nothing was loaded or run",
        "The fit has errors, and a partial load never happens.",
        "Mend what the errors say first.",
    ),
    "load-failed": Explanation(
        "load_state_dict refused the weights",
        "The model's own loading code raised, or passed names over. The message holds its reason.",
        "Mend the file, or the loading code.",
    ),
    "left-on-meta": Explanation(
        "a parameter or buffer got no value",
        "After loading, something in the model is still what the factory made, or has no value at all: its own "
        "loading code takes a name off the list without storing the tensor, or the factory builds a buffer on the "
        "meta device that no checkpoint holds. Such a model computes with noise, or not at all.",
        "Mend the model's loading code; let the factory build on the CPU.",
    ),
    "load-differs": Explanation(
        "the loaded model is not what the file holds",
        "After loading, a tensor differs from the file's bits or their cast: tied names with different "
        "values, or loading code that changes them.",
        "Find out which before trusting either.",
    ),
    "weights-not-finite": Explanation(
        "the weights hold NaN or Inf",
        "NaN anywhere, or an infinity in a parameter: training diverged, or the file is damaged.",
        "Take an earlier checkpoint.",
    ),
    "infinite-buffer": Explanation(
        "a buffer holds infinities",
        "Usual for masks; outside parameters it is no error.",
        "-",
    ),
    "weights-all-zero": Explanation(
        "every matrix of the weights is zero",
        "Every parameter of two or more dimensions is zero throughout, so outputs cannot depend on inputs: an empty "
        "template was saved, or values too small for the dtype they were cast to.",
        "Take the checkpoint that was trained, or another dtype.",
    ),
    "zero-weights": Explanation(
        "some matrices of the weights are zero",
        "A parameter of two or more dimensions is zero throughout. Layers may start so (the last of a residual "
        "branch, a new head), and stay so only if they were never trained.",
        "Make sure that the layers named were trained.",
    ),
    "negative-variance": Explanation(
        "a running variance is negative",
        "BatchNorm divides by its root, which gives NaN: the file is damaged, or weights were averaged or "
        "subtracted as a whole, with their statistics.",
        "Recompute the statistics, or take another checkpoint.",
    ),
    "zero-variance": Explanation(
        "a running variance is zero",
        "The channel never changed in training (a dead or pruned one), and evaluation scales what comes through it "
        "by 1/sqrt(eps), some 300 times.",
        "Usually harmless; look at the layers named where outputs are extreme.",
    ),
    "output-shape": Explanation(
        "the outputs are not those of the reference",
        "For its documented inputs the model gives tensors of other shapes, or under other names, than it is known "
        "to give.",
        "Compare --model and --model-arg with what the checkpoint was trained as.",
    ),
    "constant-output": Explanation(
        "the outputs do not depend on the input",
        "All elements have one value, an error unless it is 0 or 1 (a ReLU's or sigmoid's end) or a layer is zero. Or, "
        "a warning, two different inputs give the same outputs bit for bit, as models do that were never trained.",
        "Look for layers that are zero or dead; try --input with real data.",
    ),
    "not-repeatable": Explanation(
        "a second run gives another result",
        "The same input gave different outputs in eval mode, beyond the tolerance: something draws random numbers "
        "or keeps state between calls.",
        "Make the model's code respect eval mode, or seed what it draws.",
    ),
    "batch-dependent": Explanation(
        "a row's result depends on the batch it is in",
        "The same row gave different outputs alone and beside another one: something is computed over the batch, or "
        "the input's first dimension is no batch. A warning where the reference does not document its inputs.",
        "Look for BatchNorm without running statistics; give inputs with the batch first.",
    ),
    "fixed-batch": Explanation(
        "the model takes no batch of another size",
        "It was made for one size, so whether rows keep apart was not checked.",
        "-",
    ),
    "batch-not-compared": Explanation(
        "rows were not compared with those of another batch",
        "The outputs have no row for each of the input's, or are chosen by rank and threshold as a detector's are.",
        "-",
    ),
    "against-equal": Explanation(
        "both checkpoints give the same outputs",
        "Bit for bit, for the inputs shown.",
        "-",
    ),
    "against-close": Explanation(
        "both checkpoints give outputs within the tolerance",
        "They are not bit-equal: other rounding, another dtype, or weights that differ slightly. The message says how "
        "far they are apart, and the first module whose output is not bit-equal.",
        "Where they should be the same file, compare the weights.",
    ),
    "against-differs": Explanation(
        "the two checkpoints give different outputs",
        "They differ by more than the tolerance for the dtypes involved. The module named is the first, in the order "
        "modules are called, whose output does.",
        "Compare the weights of that module and those before it; --atol and --rtol set another tolerance.",
    ),
    "against-not-loaded": Explanation(
        "the other checkpoint does not go into the model",
        "Its names, shapes or values do not fit the reference that the first one fits.",
        "Mend what the message says; ckptkit verify OTHER says more.",
    ),
    "against-unwrapped": Explanation(
        "a wrapper's prefix was taken off to compare",
        "The names carry module. or _orig_mod., and fit the reference without it.",
        "-",
    ),
    "device-equal": Explanation(
        "both devices give the same outputs",
        "Bit for bit, for the inputs shown.",
        "-",
    ),
    "device-close": Explanation(
        "both devices give outputs within the tolerance",
        "Devices add up in another order, so outputs are seldom bit-equal.",
        "-",
    ),
    "device-differs": Explanation(
        "the devices give different outputs",
        "They differ by more than the tolerance, beyond what another order of adding up explains. The module named is "
        "the first whose output does. A warning for detectors, where rounding may choose other boxes.",
        "Look at that module's operations on that device; --atol and --rtol set another tolerance.",
    ),
    "golden-equal": Explanation(
        "the outputs are the golden's",
        "Bit for bit.",
        "-",
    ),
    "golden-close": Explanation(
        "the outputs are the golden's within the tolerance",
        "Another machine, dtype or version rounds differently.",
        "-",
    ),
    "golden-differs": Explanation(
        "the outputs are not the golden's",
        "The same inputs give outputs beyond the tolerance, or of other shapes: these are other weights, or another "
        "model.",
        "Find out which is right; --write-golden --force records new ones.",
    ),
    "golden-versions": Explanation(
        "the golden was recorded under other circumstances",
        "Another version of torch, device or dtype computed it; results may differ within the tolerance.",
        "-",
    ),
    "golden-written": Explanation(
        "a golden was written",
        "It holds the inputs' recipe or values, and the outputs (of large ones an evenly spaced sample).",
        "ckptkit verify FILE --golden GOLDEN holds another checkpoint against it.",
    ),
    "golden-not-written": Explanation(
        "no golden was written",
        "A model that does not pass is nothing to hold others against.",
        "Mend what the errors say first.",
    ),
    "unsafe-load": Explanation(
        "the pickled model's own code was run",
        "--unsafe-load asks torch.load to import and call what the file names. The message lists it.",
        "Verify through a reference instead: --model REF.",
    ),
    "pickled-differs": Explanation(
        "the loaded module is not what the file holds",
        "Its code changes tensors while it is loaded, so the weights in use are not those in the file.",
        "Verify through a reference instead: --model REF.",
    ),
    "forward-ok": Explanation(
        "the forward pass gave finite outputs",
        "It ran with the input and on the device shown. It does not prove accuracy.",
        "-",
    ),
    "forward-failed": Explanation(
        "the forward pass raised",
        "Most often the input has the wrong shape, or the device lacks the dtype.",
        "Give --input-shape, --device or --dtype.",
    ),
    "output-not-finite": Explanation(
        "the outputs hold NaN or Inf",
        "The weights are finite but values overflow, often in float16.",
        "Check dtype, input and training.",
    ),
    "no-output": Explanation(
        "the forward pass returned no tensor",
        "Nothing was checked.",
        "Use a factory whose model returns tensors.",
    ),
    "empty-output": Explanation(
        "the outputs are empty",
        "A detector found nothing, which says nothing about the weights.",
        "Give another --seed or --input-shape.",
    ),
    # What changed between two checkpoints.
    "prefix-differs": Explanation(
        "the names differ by the prefixes of wrappers",
        "One file was saved from a model inside DataParallel, DistributedDataParallel or torch.compile, the other was "
        "not. All tensors then have other names, though they may be the same.",
        "Compare without the prefixes: ckptkit diff A B --strip-module.",
    ),
    "not-compared": Explanation(
        "something could not be compared",
        "A tensor is a view of far more elements than are stored, or of a type whose values cannot be computed, or an "
        "object is too large to be gone through. What could not be compared does not count as equal.",
        "Look at it with ckptkit inspect in both files, or select other weights with --section.",
    ),
    "nan-appeared": Explanation(
        "NaN where there were numbers",
        "The second file has NaN in a tensor in which the first has none: the training diverged, or a cast overflowed.",
        "Do not release it: take an earlier checkpoint, or cast to a type with a larger range.",
    ),
    "ties-differ": Explanation(
        "tensors are tied in only one of the files",
        "In one file several names stand for one tensor, in the other each has a copy of its own. The values may be "
        "equal; training goes on differently, and the file with the copies is larger.",
        "ckptkit convert --tied alias keeps ties, --tied duplicate resolves them.",
    ),
    # Rules of `ckptkit check`: policy.
    "pickle-not-allowed": Explanation(
        "the file holds a pickle, and the policy allows none",
        "Loading a pickle runs the functions it names. Containers other than safetensors are pickles inside, harmless "
        "as this one may be.",
        "ckptkit convert FILE OUT.safetensors, and release that; or allow it for this file in [[check.overrides]].",
    ),
    "trust-not-allowed": Explanation(
        "loading the file takes more trust than the policy allows",
        "`safe` files name nothing but torch's own functions, `needs_trust` ones classes beyond, `hostile` ones what "
        "runs, imports or opens things, or their structure reads in two ways. Hostile files pass under no policy.",
        "ckptkit inspect FILE lists the names. ckptkit convert FILE OUT --weights-only leaves foreign objects out; do "
        "not load a hostile file.",
    ),
    "container-not-allowed": Explanation(
        "the container is none of those the policy names",
        "--require-format (in a configuration: require-format) lists the containers that files may be; a sharded set "
        "counts as what its shards are. The content decides what a file is, never its ending.",
        "ckptkit convert FILE OUT.safetensors, or with --to.",
    ),
    "file-too-large": Explanation(
        "the file is larger than the policy allows",
        "Of a sharded set all files count together. Training state and unused bytes are what most often makes files "
        "larger than they need be; ckptkit inspect FILE shows both.",
        "ckptkit convert FILE OUT --weights-only, or with --dtype or --max-shard-size.",
    ),
    "dtype-not-allowed": Explanation(
        "tensors of a dtype that the policy does not name",
        "--allow-dtype lists the dtypes that every tensor of the weights must be of. BatchNorm's num_batches_tracked "
        "is int64, and so are many index buffers.",
        "Cast with ckptkit convert FILE OUT --dtype, or allow the dtype too.",
    ),
    "values-not-finite": Explanation(
        "parameters hold NaN or Inf",
        "A model with such weights gives NaN for most inputs: its training diverged, or a cast to float16 overflowed. "
        "Buffers are not looked at: attention masks hold -Inf on purpose.",
        "Release an earlier checkpoint, or cast to bfloat16 in place of float16.",
    ),
    "optimizer-not-allowed": Explanation(
        "the file holds the state of an optimizer",
        "It is needed to resume training, not to run the model, and takes up to twice the space of the weights.",
        "ckptkit convert FILE OUT --weights-only",
    ),
    "prefix-not-allowed": Explanation(
        "names carry a wrapper's prefix, and the policy allows none",
        "`module.` is what DataParallel and DistributedDataParallel put before every name, `_orig_mod.` torch.compile. "
        "The bare model does not load such names.",
        "ckptkit convert FILE OUT --strip-module",
    ),
    "location-not-allowed": Explanation(
        "storages are tagged with a device that the policy does not name",
        "torch.load puts each storage on the device of its tag, and fails on a machine without it.",
        "ckptkit convert FILE OUT --map-location cpu",
    ),
    "check-not-run": Explanation(
        "a rule could not be applied",
        "Neither passed nor failed: the model cannot be built, no model is known, or the values are of a type that "
        "cannot be computed. The exit code is 2.",
        "The message says what is missing: --fits REF, --model-arg, --input-shape, or an installed package.",
    ),
    # Rules of `ckptkit check`: files and manifest.
    "file-unreadable": Explanation(
        "the file cannot be read",
        "It is not there, is no checkpoint, is damaged, or is refused because readers of it disagree. Nothing is known "
        "of it, so the exit code is 2.",
        "The message says what the file is and what helps; ckptkit inspect FILE says the same.",
    ),
    "nothing-selected": Explanation(
        "there is nothing to check",
        "A folder holds no checkpoint files, or the manifest names none. Nothing checked is never a success.",
        "Correct the path.",
    ),
    "file-missing": Explanation(
        "a file of the manifest is not there",
        "It was released, and is not in the folder now.",
        "Bring it back, or take it out of the manifest with ckptkit manifest --update.",
    ),
    "file-extra": Explanation(
        "a checkpoint file that is not in the manifest",
        "It lies in the manifest's folder or was named, and nobody has recorded what it must be.",
        "Take it away, or record it with ckptkit manifest --update.",
    ),
    "file-rewritten": Explanation(
        "other bytes than released, but the same tensors",
        "The file's hash is not the manifest's, the content digest is: names, dtypes, shapes and values are equal. It "
        "was converted, saved again, or something beside the weights was changed.",
        "If that is meant, record it with ckptkit manifest --update; ckptkit diff shows what is different beside the "
        "weights.",
    ),
    "file-changed": Explanation(
        "other bytes than released, in a file without tensors",
        "Without tensors there is no content digest, so all that can be said is that the file is another.",
        "Bring the released file back, or record this one with ckptkit manifest --update.",
    ),
    "tensors-differ": Explanation(
        "the tensors are not those that were released",
        "Names, dtypes, shapes or values are others than in the manifest. The message says which tensors, where the "
        "manifest was written with --digests tensor.",
        "Bring the released file back; if the change is meant, ckptkit manifest --update records it, and ckptkit diff "
        "shows how large it is.",
    ),
    "trust-worse": Explanation(
        "loading the file takes more trust than when it was released",
        "The manifest records how far a loader has to trust the file; now it names more than it did then.",
        "Find out with ckptkit inspect who put these names into it before anybody loads it.",
    ),
    "manifest-contradicts": Explanation(
        "the manifest describes another file than its hash names",
        "The file has exactly the bytes whose hash is recorded, but container, kind or tensors are not as recorded. "
        "The manifest was edited by hand, or merged wrongly.",
        "Write the entry anew with ckptkit manifest --update --force after comparing it with the release.",
    ),
    "golden-changed": Explanation(
        "the recorded outputs are missing or not those of the manifest",
        "The manifest names a file of outputs (ckptkit verify --write-golden) by path and hash.",
        "Bring it back, or record it anew.",
    ),
}

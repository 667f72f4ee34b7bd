"""Explanations of the findings about the content of a file."""

from __future__ import annotations

from ckptkit.report import Explanation

__all__ = ["CODES"]

CODES: dict[str, Explanation] = {
    # What a file holds.
    "ambiguous-section": Explanation(
        "several sections contain weights",
        "The file contains more than one set of weights (a model and its EMA, a generator and a discriminator), and "
        "nothing in it says which one is meant. Picking one silently is how the wrong weights get deployed.",
        "Name one: ckptkit convert FILE OUT --section NAME. ckptkit inspect lists the names.",
    ),
    "bound-method": Explanation(
        "the method was saved instead of its result",
        "torch.save(model.state_dict, path) without parentheses pickles the method, and with it the whole model. "
        "Loading it needs the model's code and returns a function, not weights.",
        "The weights are there: ckptkit convert FILE OUT.safetensors writes them as a state_dict.",
    ),
    "whole-model": Explanation(
        "a pickled model, not a state_dict",
        "torch.load has to import the model's classes: without the exact source tree it fails with \"No module "
        'named ..." or "Can\'t get attribute ...", and with it, it runs the code the file names.',
        "ckptkit convert FILE OUT.safetensors writes its state_dict without needing the classes.",
    ),
    "wrapped-model": Explanation(
        "the model was saved inside DataParallel, DistributedDataParallel, torch.compile or another wrapper",
        "Every name begins with the wrapper's attribute, `module.`, `_orig_mod.` or similar; the bare model does not "
        "have these names.",
        "ckptkit convert FILE OUT --strip-module",
    ),
    "compressed": Explanation(
        "the whole checkpoint is compressed",
        "torch.load, safetensors and most loaders do not decompress gzip, xz, bzip2 or zstd. ckptkit decompresses it "
        "into the temporary folder and shows what is inside. Compression makes weights only slightly smaller.",
        "ckptkit convert FILE.gz OUT.safetensors writes it in a form that can be loaded directly.",
    ),
    "unproven-weights": Explanation(
        "weights that only one file has",
        "For ZeRO stages 1 and 2 a folder has the weights twice, in fp32 and in the precision of the forward pass: "
        "each copy must equal the other after conversion, which reveals files of another run and swapped ranks. "
        "Stage 3 keeps no second copy; everything else that can be compared (sizes, steps, buffers) still is.",
        "Nothing is wrong. ckptkit verify FOLDER --model REF tries the weights in a model.",
    ),
    "optimizer-by-rank": Explanation(
        "optimizer state stored by rank, not under the parameters' names",
        "The file does not say which parameters it belongs to: its layout is not that of their flat buffers, or it "
        "has numbers instead of names. None of it is lost, and the weights do not depend on it.",
        "To run the model, --weights-only leaves it out. To continue training from it, load the folder with DeepSpeed.",
    ),
    "inside-an-archive": Explanation(
        "the checkpoint is a member of an archive",
        "The file is a zip or tar of other files (a .nemo, a stable-baselines3 model, a release), and one checkpoint "
        "in it is the model. The other members are searched for pickles and affect how far the file can be trusted.",
        "ckptkit convert FILE OUT.safetensors writes the model; FILE!MEMBER names another member.",
    ),
    "no-tensors": Explanation(
        "the file contains no tensors",
        "It is a readable pickle of plain values or objects (arguments, a scheduler, a vocabulary) without weights.",
        "Look for the weights in another file of the release.",
    ),
    "training-state": Explanation(
        "training state takes space beside the weights",
        "Optimizer moments and the like are needed to resume training, not to run the model.",
        "ckptkit convert FILE OUT --weights-only writes only the weights.",
    ),
    "other-parts": Explanation(
        "weights besides the selected ones that are not copies of them",
        "A model may be saved in parts, such as a network and its generator, likelihood or queue, or a file may "
        "contain two models. Each is a separate section; one is selected.",
        "--section NAME selects another; a .pth without --weights-only keeps them all.",
    ),
    "outside-sections": Explanation(
        "tensors that belong to no section",
        "They are attributes of a module or of a tensor, buffers that a module does not save, or parts of objects. "
        "No state_dict includes them, so a newly built model does not get them from one.",
        "--json lists them with a null section; a .pth keeps them if it keeps the object they are in.",
    ),
    "not-a-plain-tensor": Explanation(
        "values of the state_dict that are not plain tensors",
        "Quantized, sparse, nested, distributed and subclass tensors, and what modules keep as `_extra_state`, "
        "cannot be described by dtype, shape and stride alone. A .pth keeps them as they are; safetensors cannot "
        "store them.",
        "Convert to .pth, which stores them all, or turn sparse, nested and quantized ones into dense tensors with "
        "--densify. To get a whole DTensor or ShardedTensor, gather it where it was saved; --exclude leaves out "
        "values that the model does not need.",
    ),
    "arrays-as-tensors": Explanation(
        "numpy arrays that are read as tensors",
        "The file stores its weights as numpy arrays, as detectron2, caffe2 and JAX programs save them, and has no "
        "torch tensor that could be weights. Named arrays are read as tensors of the same type, shape and order; "
        "converted files contain tensors in their place. Arrays of text, of objects or with several fields remain "
        "arrays.",
        "ckptkit convert FILE OUT.pth writes tensors, which torch.load reads without trusting numpy's names.",
    ),
    "quantized-weights": Explanation(
        "the weights are quantized: several tensors together are one weight",
        "A 4-bit or 8-bit weight is a number to be multiplied by a scale stored under another name: `qweight`, "
        "`qzeros`, `scales` and `g_idx` (GPTQ; AWQ has no `g_idx` and packs differently), `weight` with "
        "`weight.absmax` and `weight.quant_state...` or `SCB` (bitsandbytes), `weight_scale_inv` (fp8 in blocks), "
        "`weight_packed`, `weight_scale` and `weight_shape` (compressed-tensors). ckptkit inspect says which scheme "
        "it is, how many bits a value has and how many values share a scale. Cast or kept without the others, such a "
        "tensor is garbage, and a model that is not quantized reports missing and unexpected keys.",
        "Load it with the library that made it. Conversions keep all of them as they are: --dtype does not cast "
        "them, and --densify makes dense values only from torch's own formats and from fp8 with scales.",
    ),
    "discarded-call": Explanation(
        "the pickle makes something and discards it",
        "Loading the file makes a call whose result is not used: it belongs to no object in the file, so the call is "
        "there for its side effect (it registers, logs or patches something), or an attacker added it. Its names "
        "count for trust, and the tensors in it are listed. This does not include calls that set the state of an "
        "object in the file; those are kept with the object.",
        "A .pth could not keep it in its place, so writing one is refused. Leave it out: ckptkit convert FILE OUT "
        "--weights-only, or write a .safetensors.",
    ),
    "not-a-model": Explanation(
        "a state_dict, not a model",
        "The file maps names to tensors. What torch.load returns has no eval() and cannot be called (\"'OrderedDict' "
        'object has no attribute ..."). Adapters (LoRA), textual inversions and data sets are stored this way too, '
        "and are recognized by their names. For an adapter, ckptkit inspect shows its type (LoRA, DoRA, LoHa, LoKr), "
        "its rank (the dimension its two projections share), its alpha, the modules it adapts and, as far as names, "
        "metadata or an adapter_config.json in the same folder tell, the model it was trained for; for a textual "
        "inversion, the words and the number of vectors of each. Nothing is merged.",
        "For weights: build the model from its code, then model.load_state_dict(ckptkit.load_state_dict(FILE)). For "
        "an adapter or an embedding, the finding says what loads it.",
    ),
    "nested-names": Explanation(
        "the weights are dicts inside dicts",
        'Megatron and flax save {"encoder": {"layer": {"weight": tensor}}}, which no module loads. ckptkit '
        "reads it with dotted names, encoder.layer.weight. A .pth written from it keeps the nested dicts if every "
        "name is unchanged; with --weights-only, renamed or left-out names, it becomes one flat dict.",
        "ckptkit convert FILE OUT --weights-only writes the flat dict.",
    ),
    "averaged-weights": Explanation(
        "averaged weights beside raw ones",
        "Training kept an exponential moving average (EMA) of the weights. Both sets have the same names and shapes; "
        "evaluation usually used the average, and the outputs of the two differ slightly.",
        "Choose one: ckptkit convert FILE OUT --section NAME",
    ),
    # Names and devices.
    "module-prefix": Explanation(
        "names have a wrapper's prefix",
        "DataParallel and DistributedDataParallel put `module.` before every name, torch.compile `_orig_mod.`, "
        "Lightning `_forward_module.`; FSDP and activation checkpointing put `_fsdp_wrapped_module.` and "
        "`_checkpoint_wrapped_module.` into names. load_state_dict then reports every key as missing and every key "
        "as unexpected; with strict=False it loads nothing.",
        "ckptkit convert FILE OUT --strip-module",
    ),
    "inner-module": Explanation(
        "names contain `module.` after their beginning",
        "DataParallel around a part of a model produces such names (`features.module.0.weight`), and so does a model "
        "that has an attribute called `module`. Names alone do not tell which, so --strip-module does not change "
        "them.",
        "If the model you load into has no such attribute: ckptkit convert FILE OUT --rename with the rule that the "
        "finding gives.",
    ),
    "stale-versions": Explanation(
        "module versions are recorded under other names than the weights",
        "torch keeps each module's version in the state_dict's `_metadata` (BatchNorm's decides how "
        "num_batches_tracked is read). The names of the weights were changed but these were not, so torch treats "
        "every module as an old one.",
        "Change names with ckptkit convert (--strip-module, --rename and similar), which changes both.",
    ),
    "device-location": Explanation(
        "storages are tagged with an accelerator",
        "torch.load restores each storage to the device it was saved from, and fails on a machine without that "
        'device: "Attempting to deserialize object on a CUDA device".',
        "ckptkit convert FILE OUT.pth --map-location cpu, or pass map_location when loading.",
    ),
    # Trust.
    "foreign-objects": Explanation(
        "objects of classes that are not torch's",
        "The pickle names classes other than tensors and plain containers. torch.load refuses them by default "
        '("Weights only load failed ... Unsupported global") or has to import and run them. This is common and not '
        "malicious.",
        "ckptkit reads the tensors without them: ckptkit convert FILE OUT.safetensors --weights-only",
    ),
    "other-system": Explanation(
        "objects tied to an operating system or a version of numpy",
        'Executing the pickle fails elsewhere: "cannot instantiate \'PosixPath\' on your system", "No module named '
        "'numpy._core'\". ckptkit creates none of these objects.",
        "ckptkit convert FILE OUT --weights-only leaves them out.",
    ),
    "hostile-name": Explanation(
        "the pickle names functions that run, import or open things",
        "Executing this pickle, as torch.load(weights_only=False) would, calls a function that no checkpoint needs.",
        "Do not load it. If you must have the weights, convert them with ckptkit, which executes nothing.",
    ),
    "crc-not-recorded": Explanation(
        "the archive has no checksums",
        "It was written with torch.serialization.set_crc32_options(False). Damage to the tensors cannot be detected.",
        "Converting it with ckptkit records checksums of the current bytes.",
    ),
    "no-checksums": Explanation(
        "the container has no checksums",
        "Files written by torch before 1.6 have none. ckptkit checks that all sizes agree and every byte is "
        "accounted for; a changed bit inside a tensor cannot be detected.",
        "Converting it with ckptkit records checksums of the current bytes.",
    ),
    "unreferenced-records": Explanation(
        "records of the archive that nothing refers to",
        "torch reads only the storages that the pickle names. Other records are dead weight, or another tool added "
        "them; torch.load never reads a second pickle beside the first, but another program might.",
        "Converting writes only what the checkpoint uses.",
    ),
    "repacked-archive": Explanation(
        "an archive that was unpacked and packed again",
        "torch writes all records of an archive into one folder and refuses an archive with anything beside it: "
        "files added by macOS (__MACOSX), a README, an outer folder. It also refuses one without the record `version`. "
        "Exactly one folder in this archive is torch's, so there is no doubt which one is meant. Everything outside it "
        "still counts for trust.",
        "ckptkit convert FILE NEW.pth writes an archive that torch loads. A program (TorchScript, torch.package, "
        ".pt2) has to be packed again: unpack it, then run zip -0 -r NEW.pt FOLDER, where FOLDER contains its "
        "records.",
    ),
    "text-persistent-ids": Explanation(
        "pickled with protocol 0, which torch does not load",
        "torch.save(..., pickle_protocol=0) writes files that no torch.load can read: protocol 0 has text where "
        "other protocols have the references to the tensors' bytes. The text contains everything that is needed.",
        "ckptkit convert FILE NEW.pth writes it in protocol 2, which torch loads.",
    ),
    # Programs.
    "not-looked-into": Explanation(
        "parts that may contain a pickle or a program and could not be searched",
        "Archives are searched one level deep and within limits. Anything compressed, encrypted, damaged, too large "
        "or in an archive inside an archive could contain anything, so the file cannot be called safe. In `check` "
        "with --no-pickle or --max-trust, a file that is not a checkpoint then neither passes nor fails: the exit "
        "code is 2.",
        "Unpack it and check its contents, or remove it from the release. Converting a checkpoint writes only what "
        "it uses: ckptkit convert FILE OUT.safetensors",
    ),
    "torchscript-program": Explanation(
        "a TorchScript program, not a plain checkpoint",
        'torch.jit.save wrote it: weights together with the code that uses them. torch.load refuses it ("Cannot use '
        "weights_only=True with TorchScript archives\"), and the model's Python class is not needed to run it.",
        "torch.jit.load runs it; ckptkit convert FILE OUT.safetensors writes its weights.",
    ),
    "torchscript-without-code": Explanation(
        "a TorchScript program without its source",
        "Each class's source tells parameters from buffers, and it is missing. Tensors that require a gradient are "
        "treated as parameters, the others as buffers, including plain attributes.",
        "-",
    ),
    "extra-files": Explanation(
        "the author's own files in a TorchScript program",
        "torch.jit.save(model, FILE, _extra_files={name: text}) stores them beside the program, below extra/: "
        "settings, class names, a vocabulary. They are not weights, and no other container has a place for them.",
        "Keep the program, or extract them from it: unzip FILE '*/extra/*'",
    ),
    "own-script-state": Explanation(
        "modules of a program that save custom state",
        "A script module may have __getstate__ and __setstate__ methods: the file then contains whatever "
        "__getstate__ returns, a tuple of tensors for example, and nothing says which parameter each tensor is. Only "
        "the program's code knows.",
        "Call torch.jit.load(FILE) and its state_dict(), which runs the program: only with a file you trust. ckptkit "
        "inspect lists the tensors.",
    ),
    "frozen-program": Explanation(
        "a frozen program: weights without names",
        "torch.jit.freeze and the mobile optimizer turn parameters into numbered constants in the code. There is no "
        "state_dict left to load into a model.",
        "Use the program it was frozen from. ckptkit inspect lists the constants with their shapes.",
    ),
    "foreign-program": Explanation(
        "compiled code beside the weights",
        "The archive contains libraries or programs built for one machine (AOTInductor, ExecuTorch, shared "
        "libraries, GPU kernels). They are listed but not read; loading the archive runs them, so the file needs "
        "trust.",
        "Load it only if you trust where it came from.",
    ),
    "embedded-source": Explanation(
        "source text of the model's classes",
        "torch before 1.6 stored the source of each nn.Module class in a file with a whole model, so that it could "
        "warn if the class had changed. It is text: nothing runs it. It may still reveal code and paths that were "
        "not meant for release.",
        "ckptkit convert FILE OUT.safetensors writes the weights without it.",
    ),
    "package-code": Explanation(
        "a torch.package archive with Python code",
        "PackageImporter runs the Python sources in the archive to make the objects it contains. ckptkit runs none "
        "of them.",
        "ckptkit convert FILE OUT.safetensors --section NAME writes only the weights.",
    ),
    # Memory.
    "tied-tensors": Explanation(
        "names that are the same tensor",
        "Tied parameters are one tensor under several names. ckptkit keeps them tied: in .pth as torch does, in "
        "safetensors as an alias in the metadata, which safetensors' load_model and ckptkit understand.",
        "-",
    ),
    "shared-storage": Explanation(
        "different views of one storage",
        "These tensors overlap or are slices of one buffer (such as cuDNN's flat RNN weights). They stay that way in "
        ".pth; in safetensors each is written separately.",
        "-",
    ),
    "not-contiguous": Explanation(
        "tensors that are not contiguous",
        "Transposed weights are common in ports from TensorFlow. Tools that copy a storage's bytes and ignore its "
        "strides write wrong values.",
        "Converting to safetensors writes their elements in order; the values do not change.",
    ),
    "unused-bytes": Explanation(
        "storages are larger than the tensors that view them",
        "torch.save writes the whole storage even when only a small view of it is kept.",
        "Converting writes only the bytes that tensors use.",
    ),
    "big-endian": Explanation(
        "written on a big-endian machine",
        "The bytes of each element are in the opposite order to that of today's machines. ckptkit reverses them when "
        "it writes or loads values.",
        "-",
    ),
    # Shards and containers.
    "foreign-part": Explanation(
        "files from another save are in the folder",
        "The folder's .metadata names every file that belongs to its checkpoint, and the folder has .distcp files "
        "that it does not name. Saving again into the same folder with fewer ranks leaves such files behind; they "
        "are not read.",
        "Save into a new folder each time. Once the checkpoint has been checked, the files can be deleted: ckptkit "
        "check FOLDER",
    ),
    "later-part": Explanation(
        "files are newer than the .metadata that names them",
        "A save writes .metadata last. If other files of the checkpoint are newer, a later save into the same folder "
        "may have replaced them and failed before writing its own .metadata: the checkpoint then mixes tensors of "
        "two steps, each complete. Copying without preserving file times looks the same.",
        "Compare the times with the run's log, and copy with cp -a or rsync -a. Save into a new folder each time.",
    ),
    "part-of-a-checkpoint": Explanation(
        "the file is part of a checkpoint, not the whole",
        "Shards of an index, the files that FSDP, DeepSpeed, Megatron and torch.distributed.checkpoint write for "
        "each rank, slices of tensors and empty stubs contain only some of the values. A model loaded from one of "
        "them lacks the rest, so convert, verify, diff, check, manifest and load_state_dict refuse them.",
        "Give what the finding names: the index of the shards, or the folder that contains the files of all ranks, "
        "which ckptkit opens as one checkpoint. --allow-part takes the part as it is.",
    ),
    "items-not-read": Explanation(
        "pickles of a sharded checkpoint that were not read",
        "In a torch.distributed.checkpoint folder each slice of a tensor is a separate pickle. inspect reads where "
        "they are, but not the slices themselves: the names in them are unknown, so the folder's trust is "
        "needs_trust at best.",
        "ckptkit check FOLDER reads and checks every one; convert, verify, diff and load do so before they begin.",
    ),
    "copies-not-compared": Explanation(
        "values that several files have and that inspect does not compare",
        "If every rank has a copy of a value, it is read from one file. A copy that differs means that ranks of "
        "different runs or steps were mixed, or that a file is damaged; the same is true of a DeepSpeed weight that "
        "differs from its fp32 master.",
        "ckptkit check FOLDER compares them all; convert, verify, diff and load do so before they begin.",
    ),
    "step-chosen": Explanation(
        "the folder contains several steps, and one was chosen",
        "DeepSpeed and Megatron write the name of the last step into a file beside the steps (latest, "
        "latest_checkpointed_iteration.txt). Giving a folder with such a file means that step.",
        "--tag NAME chooses another.",
    ),
    "not-merged": Explanation(
        "state of several ranks that is left out, or kept as flat buffers",
        "Each rank of a run has a share of the optimizer state, indexed by numbers that mean something only to that "
        "rank. The weights are merged; the files do not say which parameter such values belong to.",
        "Nothing, if you only need the weights. To continue training, load the folder with the program that wrote it.",
    ),
    "taken-of-one-rank": Explanation(
        "values taken from one rank's copy",
        "Several ranks have a tensor under one name and no rule says how it was split, but all begin with the same "
        "values: it is treated as a copy, and compared whenever values are read. The same applies to the last "
        "pipeline stage's copy of tied embeddings.",
        "If such a tensor was in fact split, give rules with --tp-rules FILE.",
    ),
    "empty-extra-state": Explanation(
        "modules whose extra state is empty",
        "Megatron's layers save an `_extra_state` for FP8 scaling factors even when there are none: it is None. "
        "Leaving it out loses no value, and safetensors has no place for it.",
        "Nothing; for a model that is loaded strictly and asks for it, use load_state_dict(..., strict=False).",
    ),
    "padded-vocabulary": Explanation(
        "the embeddings have more rows than there are tokens",
        "Megatron adds rows to the vocabulary until it divides evenly among its ranks. The rows are kept: only the "
        "tokenizer knows which ones are tokens.",
        "Nothing; a program that expects the exact number of rows cuts them off.",
    ),
    "old-qkv-order": Explanation(
        "rows of queries, keys and values in an order that Megatron no longer uses",
        "Before checkpoint_version 2.0 the rows of the joined projection were in another order, and Megatron "
        "reorders them when it loads such a file. They are joined and kept in the order of the file.",
        "Load the file with Megatron and save it again, or reorder the rows: see fix_query_key_value_ordering there.",
    ),
    "completeness-unknown": Explanation(
        "nothing in the files proves that all of them are there",
        "The files of a folder that several ranks wrote fit together and leave no gaps. But neither the file names "
        "nor the files say how many ranks there were, and the hub's sharded safetensors do not even record the "
        "shapes of whole tensors. If the last files are missing, tensors are shorter than they should be.",
        "Compare with the run's settings, or check the shapes against the model: ckptkit verify FOLDER --model REF",
    ),
    "rank-values": Explanation(
        "values that differ from rank to rank",
        "The states of random generators, samplers and the like differ from rank to rank, and so do the running "
        "statistics of batch normalization unless a process group synchronizes them. A checkpoint of a single "
        "process has one of each: those of rank 0 are taken.",
        "Nothing needs to be done to use the weights. To resume on the same number of ranks with the same random "
        "numbers, keep the ranks' files.",
    ),
    "flat-optimizer": Explanation(
        "an optimizer's state belongs to FSDP's flat parameters",
        "optimizer.state_dict() of a model in FSDP's first version has the moments of flat parameters, a "
        "one-dimensional run from each rank. They are joined in the order of the ranks; the files do not contain the "
        "names and shapes of the parameters. Only the same model in FSDP with the same units can continue from them.",
        "The weights are not affected. To get the state by parameter, save FSDP.optim_state_dict(model, optimizer).",
    ),
    "saved-apart": Explanation(
        "files of one checkpoint were written more than a day apart",
        "Ranks save at about the same time. Files that are days apart may be left over from another run or step, if "
        "a save did not overwrite all of them; equal shapes do not reveal that.",
        "ckptkit check FOLDER compares what the ranks have in common. If the files were copied or touched since, the "
        "times mean nothing.",
    ),
    "shard-extra-keys": Explanation(
        "shards contain tensors that the index does not list",
        "Loaders that follow the index leave them out, loaders that read whole shards take them. ckptkit takes them, "
        "after the listed ones.",
        "Writing one file settles it: ckptkit convert INDEX OUT.safetensors",
    ),
    "shard-not-named": Explanation(
        "a shard that the index does not name",
        "Shards are called NAME-00001-of-00003, which means that there are three. The index puts no tensor into one "
        "of them, so it is not read: either it is empty, or the index lost its names.",
        "Look at it: ckptkit inspect NAME-00002-of-00003.safetensors. If it contains tensors, download the index "
        "again.",
    ),
    "shard-metadata": Explanation(
        "shards whose metadata differ",
        "Another file leaves out, or contradicts, what one file says about the whole checkpoint in its header. A key "
        "that only one shard has is taken for the whole; of two values the first is used, and the other is kept with "
        "the shard's name before it.",
        "Converting the index writes the values shown; --metadata KEY=VALUE sets one.",
    ),
    "shard-total-size": Explanation(
        "the index states a different total size from the shards",
        "Loaders use it to reserve memory. The index may belong to another version of the shards.",
        "Download index and shards from the same revision, or write the checkpoint again.",
    ),
    "unaligned-data": Explanation(
        "tensor data is not aligned",
        "Elements begin at addresses that are not multiples of their width, as older writers left them. Every reader "
        "accepts that; some copy each tensor, or run slower, because of it.",
        "ckptkit convert FILE OUT.safetensors writes it aligned.",
    ),
}

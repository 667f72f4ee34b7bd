"""What the findings about what a file holds mean."""

from __future__ import annotations

from ckptkit.report import Explanation

__all__ = ["CODES"]

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
        "the model was saved inside DataParallel, DistributedDataParallel, torch.compile or another wrapper",
        "Every name begins with the wrapper's attribute, `module.`, `_orig_mod.` or the like; the bare model does not "
        "know these names.",
        "ckptkit convert FILE OUT --strip-module",
    ),
    "compressed": Explanation(
        "the checkpoint is compressed as a whole",
        "torch.load, safetensors and most loaders do not decompress gzip, xz, bzip2 or zstd. ckptkit does, into the "
        "temporary folder, and shows what comes of it; weights shrink little by it.",
        "ckptkit convert FILE.gz OUT.safetensors writes it as it is to be loaded.",
    ),
    "unproven-weights": Explanation(
        "weights that only one file has",
        "Of ZeRO's stages 1 and 2 a folder has the weights twice, in fp32 and in the precision of the forward pass: "
        "each must be the other converted, which finds files of another run, or ranks that were swapped. Stage 3 keeps "
        "no second copy; what can be held against each other (sizes, steps, buffers) still is.",
        "Nothing is wrong. ckptkit verify FOLDER --model REF tries the weights in a model.",
    ),
    "optimizer-by-rank": Explanation(
        "optimizer state that stands as it was saved, not under the parameters' names",
        "The file does not say to which parameters it belongs: it is not laid out as their flat buffers are, or has "
        "numbers in place of names. Nothing of it is lost, and the weights do not depend on it.",
        "To run the model, --weights-only leaves it out. To go on training from it, load the folder with DeepSpeed.",
    ),
    "inside-an-archive": Explanation(
        "the checkpoint is a member of an archive",
        "The file is a zip or tar of other files (a .nemo, a model of stable-baselines3, a release), and one "
        "checkpoint in it is the model. What else lies there is looked at for pickles, and counts for the trust in "
        "the file.",
        "ckptkit convert FILE OUT.safetensors writes the model; FILE!MEMBER names another member.",
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
    "other-parts": Explanation(
        "weights beside the selected ones that are not copies of them",
        "A model may be saved in parts, a network and its generator, likelihood or queue, or a file may hold two "
        "models. Each is a section of its own; one is selected.",
        "--section NAME selects another; a .pth without --weights-only keeps them all.",
    ),
    "outside-sections": Explanation(
        "tensors that belong to no section",
        "They are attributes of a module or of a tensor, buffers that a module does not save, or parts of objects. No "
        "state_dict has them, so a model that is built anew does not get them from one.",
        "They are listed with a null section by --json; a .pth keeps them where the object they are in is kept.",
    ),
    "not-a-plain-tensor": Explanation(
        "values of the state_dict that are not plain tensors",
        "Quantized, sparse, nested, distributed and subclass tensors, and what modules keep as `_extra_state`, cannot "
        "be described by dtype, shape and stride. They are kept as they are in .pth; safetensors cannot hold them.",
        "Convert to .pth, which holds them all, or make dense tensors of sparse, nested and quantized ones with "
        "--densify. A DTensor or ShardedTensor is made whole by gathering it where it was "
        "saved; values that the model can do without are left out with --exclude.",
    ),
    "arrays-as-tensors": Explanation(
        "numpy arrays that are read as tensors",
        "The file holds its weights as numpy arrays, as detectron2, caffe2 and JAX programs save them, and no torch "
        "tensor that could be weights. Arrays under names are taken for tensors of the same type, shape and order; "
        "what is converted has tensors in their place. Arrays of text, of objects or of several fields stay arrays.",
        "ckptkit convert FILE OUT.pth writes tensors, which torch.load reads without trusting numpy's names.",
    ),
    "quantized-weights": Explanation(
        "the weights are quantized: several tensors together are one weight",
        "A weight of 4 or 8 bits is a number to be multiplied by a scale that stands under another name: `qweight`, "
        "`qzeros`, `scales` and `g_idx` (GPTQ; AWQ has no `g_idx` and packs another way), `weight` with "
        "`weight.absmax` and `weight.quant_state...` or `SCB` (bitsandbytes), `weight_scale_inv` (fp8 in blocks), "
        "`weight_packed`, `weight_scale` and `weight_shape` (compressed-tensors). ckptkit inspect says which it is, "
        "how many bits a value has and how many values share a scale. Cast or left out alone, such a tensor is "
        "garbage, and a model that is not quantized reports missing and unexpected keys.",
        "Load it with the library that made it. Conversions keep all of them as they are: --dtype does not cast them, "
        "--densify makes dense values of those of torch and of fp8 with scales.",
    ),
    "discarded-call": Explanation(
        "the pickle makes something and drops it",
        "Loading the file makes a call whose result goes nowhere: it belongs to no object in the file, so it is there "
        "for what it does (it registers, logs, patches), or it is what an attacker added. Its names count for trust, "
        "and the tensors in it are listed. What a pickle calls to set the state of an object in the file is kept with "
        "that object, and is not meant here.",
        "A .pth could not keep it in its place and is refused. Leave it out: ckptkit convert FILE OUT --weights-only, "
        "or write a .safetensors.",
    ),
    "not-a-model": Explanation(
        "a state_dict, not a model",
        "The file maps names to tensors. What torch.load returns has no eval() and cannot be called (\"'OrderedDict' "
        'object has no attribute ..."). Adapters (LoRA), textual inversions and data sets are kept so, too, and are '
        "told by their names. ckptkit inspect says of an adapter which kind it is (LoRA, DoRA, LoHa, LoKr), its rank "
        "(the size that its two projections share), its alpha, which modules it adapts, and the model it was trained "
        "for as far as names, metadata or an adapter_config.json beside it tell; of a textual inversion the words and "
        "how many vectors each has. Nothing is merged.",
        "Of weights: build the model from its code, then model.load_state_dict(ckptkit.load_state_dict(FILE)). What "
        "takes an adapter or an embedding is said with the finding.",
    ),
    "nested-names": Explanation(
        "the weights are dicts inside dicts",
        'Megatron and flax save {"encoder": {"layer": {"weight": tensor}}}, which no module loads. ckptkit reads it '
        "under dotted names, encoder.layer.weight. A .pth written from it keeps the dicts as long as every name "
        "stays; with --weights-only, new names or names left out it becomes one flat dict.",
        "ckptkit convert FILE OUT --weights-only writes the flat dict.",
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
        "DataParallel and DistributedDataParallel put `module.` before every name, torch.compile `_orig_mod.`, "
        "Lightning `_forward_module.`; FSDP and activation checkpointing put `_fsdp_wrapped_module.` and "
        "`_checkpoint_wrapped_module.` into names. load_state_dict then reports every key missing and every key "
        "unexpected; with strict=False it loads nothing.",
        "ckptkit convert FILE OUT --strip-module",
    ),
    "inner-module": Explanation(
        "names carry `module.` further in than at their beginning",
        "That is what DataParallel around a part of a model leaves (`features.module.0.weight`), and also what an "
        "attribute of the model's own called `module` gives. Names alone do not tell which, so --strip-module leaves "
        "it.",
        "If the model you load into has no such attribute: ckptkit convert FILE OUT --rename with the rule that the "
        "finding gives.",
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
    "repacked-archive": Explanation(
        "an archive that was unpacked and packed again",
        "torch writes all records of an archive into one folder and refuses an archive with anything beside it: what "
        "macOS adds (__MACOSX), a README, a folder around the folder. Exactly one folder in it is torch's, so there is "
        "no doubt about what is meant. What lies outside counts for the trust all the same.",
        "ckptkit convert FILE NEW.pth writes an archive that torch loads. A program (TorchScript, torch.package, .pt2) "
        "is to be packed again: unpack it, and zip -0 -r NEW.pt FOLDER, with the folder that has its records.",
    ),
    "text-persistent-ids": Explanation(
        "pickled with protocol 0, which torch does not load",
        "torch.save(..., pickle_protocol=0) writes files that no torch.load takes: protocol 0 has text where other "
        "protocols have the references to the tensors' bytes. The text holds all that is needed.",
        "ckptkit convert FILE NEW.pth writes it in protocol 2, which torch loads.",
    ),
    # Programs.
    "not-looked-into": Explanation(
        "what may hold a pickle or a program, and could not be looked into",
        "Archives are looked into one level and within bounds. What is compressed, encrypted, damaged, too large or "
        "an archive inside an archive may hold anything, so nobody vouches for the file. In `check`, with --no-pickle "
        "or --max-trust, a file that is not a checkpoint has then neither passed nor failed: the exit code is 2.",
        "Unpack it and check what is in it, or take it out of what is released. Converting a checkpoint writes only "
        "what it uses: ckptkit convert FILE OUT.safetensors",
    ),
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
    "extra-files": Explanation(
        "files of the author's own in a TorchScript program",
        "torch.jit.save(model, FILE, _extra_files={name: text}) keeps them beside the program, below extra/: settings, "
        "names of classes, a vocabulary. They are not weights, and no other container has a place for them.",
        "Keep the program, or take them out of it: unzip FILE '*/extra/*'.",
    ),
    "own-script-state": Explanation(
        "modules of a program that save a state of their own making",
        "A script module may have __getstate__ and __setstate__ methods: the file then holds what these give, a tuple "
        "of tensors for example, and nothing says which parameter each is. Only the program's code knows.",
        "torch.jit.load(FILE) and its state_dict(), which runs the program: only with a file you trust. ckptkit "
        "inspect lists the tensors.",
    ),
    "frozen-program": Explanation(
        "a frozen program: weights without names",
        "torch.jit.freeze and the mobile optimizer turn parameters into numbered constants of the code. There is no "
        "state_dict left to load into a model.",
        "Use the program it was frozen from. ckptkit inspect lists the constants with their shapes.",
    ),
    "foreign-program": Explanation(
        "compiled code beside the weights",
        "The archive holds libraries or programs built for one machine (AOTInductor, ExecuTorch, shared libraries, GPU "
        "kernels). They are named, not read; whoever loads the archive runs them, so the file needs trust.",
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
    "foreign-part": Explanation(
        "files of another save lie in the folder",
        "The folder's .metadata names every file that belongs to its checkpoint, and there are .distcp files that it "
        "does not name. Saving again into the same folder with fewer ranks leaves such files; they are not read.",
        "Save into a new folder each time. The files can be deleted once the checkpoint was checked: ckptkit check "
        "FOLDER.",
    ),
    "later-part": Explanation(
        "files are newer than the .metadata that names them",
        "A save writes .metadata last. Where other files of the checkpoint are newer, a later save into the same "
        "folder may have replaced them and died before its own .metadata: tensors of two steps, each whole, in one "
        "checkpoint. Copies that do not keep the times of files look the same.",
        "Compare the times with those of the run's log, and copy with cp -a or rsync -a. Save into a new folder each "
        "time.",
    ),
    "part-of-a-checkpoint": Explanation(
        "the file is a part of a checkpoint, not the whole",
        "Shards of an index, the files that FSDP, DeepSpeed, Megatron and torch.distributed.checkpoint write for each "
        "rank, slices of tensors and empty stubs hold some of the values. Taken for the whole they give a model that "
        "lacks the rest: convert, verify, diff, check, manifest and load_state_dict refuse them.",
        "Give what the finding names: the index of the shards, or the folder that the files of all ranks lie in, which "
        "ckptkit opens as one checkpoint. --allow-part takes the part as it is.",
    ),
    "items-not-read": Explanation(
        "pickles of a sharded checkpoint that were not read",
        "In a folder of torch.distributed.checkpoint each slice of a tensor is a pickle of its own. inspect reads what "
        "says where they lie, and none of the slices themselves: what they name is not known, and the trust in the "
        "folder is needs_trust at best.",
        "ckptkit check FOLDER reads and judges every one; convert, verify, diff and load do so before they begin.",
    ),
    "copies-not-compared": Explanation(
        "values that several files have, and that inspect does not compare",
        "What every rank has a copy of is taken from one file. Where a copy differs, ranks of different runs or steps "
        "were mixed, or a file is damaged: so are a DeepSpeed weight and its fp32 master that differ.",
        "ckptkit check FOLDER compares them all; convert, verify, diff and load do so before they begin.",
    ),
    "step-chosen": Explanation(
        "the folder holds several steps, and one was chosen",
        "DeepSpeed and Megatron write the name of the last step into a file beside the steps (latest, "
        "latest_checkpointed_iteration.txt). A folder that has one stands for that step.",
        "--tag NAME chooses another.",
    ),
    "not-merged": Explanation(
        "state of several ranks that is left out, or kept as the flat buffers it lies in",
        "Each rank of a run holds a share of the optimizer's state, by numbers that mean something to that rank alone. "
        "The weights are merged; which parameter such values belong to, the files do not say.",
        "Nothing, where the weights are what is wanted. To go on training, load the folder with the program that "
        "wrote it.",
    ),
    "taken-of-one-rank": Explanation(
        "values of which one rank's copy was taken",
        "Several ranks have a tensor under one name and no rule says how it was cut, but all begin with the same "
        "values: it is taken for a copy, and compared wherever values are read. So is what the last stage of a "
        "pipeline has of tied embeddings.",
        "Give rules with --tp-rules FILE where such a tensor is cut after all.",
    ),
    "empty-extra-state": Explanation(
        "modules whose extra state is empty",
        "Megatron's layers save an `_extra_state` for scaling factors of FP8 even where there are none: it is None. No "
        "value is lost with it, and safetensors has no place for it.",
        "Nothing; a model that is loaded strictly and asks for it takes load_state_dict(..., strict=False).",
    ),
    "padded-vocabulary": Explanation(
        "the embeddings have more rows than there are tokens",
        "Megatron adds rows to the vocabulary until its ranks can share it out. They are kept: which are tokens, the "
        "tokenizer knows.",
        "Nothing; a program that expects the exact number of rows cuts them off.",
    ),
    "old-qkv-order": Explanation(
        "rows of queries, keys and values in an order that Megatron no longer uses",
        "Before checkpoint_version 2.0 the rows of the joined projection were ordered otherwise, and Megatron moves "
        "them when it loads such a file. They are joined and kept in the order of the file.",
        "Load the file with Megatron and save it again, or move the rows: see fix_query_key_value_ordering there.",
    ),
    "completeness-unknown": Explanation(
        "nothing in the files proves that all of them are there",
        "The files of a folder that several ranks wrote fit together, and leave nothing out in between. How many ranks "
        "there were stands neither in their names nor in them; the hub's sharded safetensors do not even have the "
        "shapes of whole tensors. If the last files are missing, tensors are shorter than they should be.",
        "Compare with the run's settings, or hold the shapes against the model: ckptkit verify FOLDER --model REF",
    ),
    "rank-values": Explanation(
        "values that each rank has of its own",
        "States of random generators, of samplers and the like differ from rank to rank, and so do the running "
        "statistics of batch normalization where no process group makes them alike. A checkpoint of one process "
        "has one of each: those of rank 0 are taken.",
        "Nothing needs to be done to use the weights. To resume on as many ranks with the same random numbers, keep "
        "the ranks' files.",
    ),
    "flat-optimizer": Explanation(
        "an optimizer's state is that of FSDP's flat parameters",
        "optimizer.state_dict() of a model in FSDP's first version has the moments of flat parameters, of each rank a "
        "run of one dimension. They are put together in the order of the ranks; names and shapes of the parameters "
        "are not in the files. Only the same model in FSDP with the same units can go on with them.",
        "The weights are not concerned. To have the state by parameter save FSDP.optim_state_dict(model, optimizer).",
    ),
    "saved-apart": Explanation(
        "files of one checkpoint were written more than a day apart",
        "Ranks save at about the same time. Files that are days apart may be left from another run or step, where a "
        "save did not overwrite all of them; equal shapes do not show that.",
        "ckptkit check FOLDER compares what the ranks have in common. If the files were copied or touched since, the "
        "times say nothing.",
    ),
    "shard-extra-keys": Explanation(
        "shards hold tensors that the index does not list",
        "Loaders that go by the index leave them out, loaders that read whole shards take them. ckptkit takes them, "
        "after the listed ones.",
        "Writing one file settles it: ckptkit convert INDEX OUT.safetensors",
    ),
    "shard-not-named": Explanation(
        "a shard that the index does not name",
        "Shards are called NAME-00001-of-00003: by that there are three. The index puts no tensor into one of them, "
        "which is not read then: it is empty, or its names were lost from the index.",
        "Look at it: ckptkit inspect NAME-00002-of-00003.safetensors. If it holds tensors, get the index again.",
    ),
    "shard-metadata": Explanation(
        "shards whose metadata differ",
        "What one file says of the whole in its header, another leaves out or says otherwise. A key that one shard "
        "alone has is taken for the whole; of two values the first is, and the other is kept with the shard's name "
        "before it.",
        "Converting the index writes them as they are shown; --metadata KEY=VALUE sets one.",
    ),
    "shard-total-size": Explanation(
        "the index states another total size than the shards have",
        "Loaders reserve memory by it. The index may belong to another version of the shards.",
        "Get index and shards from the same revision, or write the checkpoint anew.",
    ),
    "unaligned-data": Explanation(
        "tensor data is not aligned",
        "Elements begin at addresses that are not multiples of their width, as older writers left them. Every reader "
        "takes that; some copy each tensor, or run slower, for it.",
        "ckptkit convert FILE OUT.safetensors writes it aligned.",
    ),
}

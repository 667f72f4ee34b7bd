"""What the findings of ``ckptkit convert``, ``ckptkit diff`` and ``ckptkit check`` mean."""

from __future__ import annotations

from ckptkit.report import Explanation

__all__ = ["CHECKS", "CONVERSION", "DIFFERENCES"]

CONVERSION: dict[str, Explanation] = {
    "left-out": Explanation(
        "parts of the source that the output does not hold",
        "What stood beside the weights (optimizer, scheduler, epoch, arguments) and was named to be left out, or of a "
        "program all but its weights. Training cannot be resumed from the output alone.",
        "Write a .pth without --weights-only and --leave-out to keep them.",
    ),
    "weights-left-out": Explanation(
        "weights that the output does not hold",
        "The source holds weights beside those that were selected, and no copies of them: a generator, a likelihood, "
        "a second model. The output has the selected ones alone; whoever needs both parts misses one.",
        "Convert each with --section NAME, or write a .pth without --weights-only, which keeps all.",
    ),
    "attributes-left-out": Explanation(
        "tensors in attributes or objects that the output does not hold",
        "They stand in no section: attributes of a module or a tensor, buffers that a module does not save, parts of "
        "objects. A state_dict does not have them, so what is written does not.",
        "A .pth written from a file that holds the model in a dict keeps the model as it is, without --weights-only, "
        "--rename, --dtype and --include.",
    ),
    "module-left-out": Explanation(
        "a model is written as its state_dict",
        "The source holds the model itself, with its class and settings. Names, dtypes and selections are those of a "
        "state_dict, so that is what is written.",
        "Without --weights-only, renaming, --dtype, --include and --exclude, a .pth keeps the model as it is.",
    ),
    "not-converted": Explanation(
        "a file of a folder could not be converted",
        "It is damaged, holds several sections or none, or has what the output cannot hold; the message says which. "
        "Nothing was written for it, and the other files were converted.",
        "Convert the file alone, with the option that the message names: ckptkit convert FILE DST/.",
    ),
    "hostile-output": Explanation(
        "the output names what runs, imports or opens",
        "A .pth keeps everything that is in the source, and with it what the source would run when it is loaded with "
        "pickle. ckptkit ran nothing of it; it is in the output as it was in the source.",
        "Write a .safetensors, or leave out what holds the names: --weights-only, --leave-out KEY, --exclude GLOB.",
    ),
    "all-tensors": Explanation(
        "every tensor of the file, named by the keys that lead to it",
        "--all-tensors takes what stands in dicts, lists, tuples, objects and several sections for one flat "
        "state_dict: optimizer.state.3.exp_avg, 0, generator.conv.weight. Nothing else is in it.",
        "A .pth written without --all-tensors keeps everything in its place.",
    ),
    "kept-beside": Explanation(
        "plain values beside the weights that the output holds",
        "--keep-beside keeps numbers, text, lists, tuples, dicts, sets and argument namespaces: in a .safetensors as "
        "JSON in the metadata, under ckptkit_beside. A .pth that is written from it has them in their places again.",
        "-",
    ),
    "not-kept": Explanation(
        "parts beside the weights that are more than plain values",
        "--keep-beside keeps what Python itself can make of text. Tensors, optimizers with state and objects of other "
        "classes are more, and so is what takes more than one MiB of text.",
        "Write a .pth, which keeps everything, or leave them out by name: --leave-out KEY",
    ),
    "plain-values": Explanation(
        "numbers or text among the tensors of a state_dict",
        "Some models keep settings among their weights (height, use_mask). A .pth keeps them in their places; a "
        ".safetensors holds tensors alone.",
        "--keep-beside writes them into the metadata of the .safetensors, and back into a .pth made from it.",
    ),
    "replaced": Explanation(
        "the weights took the place of what stood under a key",
        "--as KEY puts the selected weights under a key of the output. What the source held there is not in it: the "
        "raw weights, where an average of them was promoted.",
        "Give --as a key that is not taken to keep both.",
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
    "nothing-moved": Explanation(
        "nothing in the file is on a device that was to be mapped",
        "--map-location OLD=NEW goes by the whole tag, as torch.load's map_location does: cuda is not cuda:0.",
        "ckptkit inspect FILE shows the devices there are; --map-location NEW alone maps all of them.",
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
    "like-reference": Explanation(
        "the output holds exactly the tensors of the reference",
        "--like REF found every tensor of the model, by name and shape, in one section and under one change of names. "
        "What else the file holds (heads, queues, averages, training state) is left out and listed.",
        "ckptkit verify OUT --model REF also loads the weights and runs the model.",
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
    "untied": Explanation(
        "tensors with several names are no longer tied",
        "torch.distributed.checkpoint saves a tensor under each of its names, and does not say which are one. Each "
        "name holds the same values in the output, in its own bytes.",
        "The model that loads them ties them again. --tied error refuses such tensors.",
    ),
    "flattened": Explanation(
        "a tree as torch.distributed.checkpoint keeps it",
        "Its planner saves values under the keys that lead to them. Dicts of other classes become plain ones, without "
        "their attributes (the module versions of a state_dict are one); keys that are not text become text; an empty "
        "dict vanishes. torch.distributed.checkpoint.save does the same.",
        "A .pth keeps all of it.",
    ),
    "compacted": Explanation(
        "bytes that no tensor views were left behind",
        "torch.save writes whole storages, even where a small slice is all that is kept. The output's storages hold "
        "what tensors view of them; values, strides and sharing stay.",
        "-",
    ),
    "not-sharded": Explanation(
        "one file, where an index of shards was asked for",
        "All of the output fits into one file of the size that a shard may have, and a single file needs no index.",
        "Use the file; --max-shard-size makes shards of less.",
    ),
    "densified": Explanation(
        "tensors of another form were made dense",
        "Sparse tensors were written out with their zeros, nested ones padded with zeros to one size, numbers of a few "
        "bits multiplied with their scales, as torch's to_dense(), to_padded_tensor(0) and dequantize() do. The "
        "output holds plain tensors; it is larger, and a quantized module does not load it: the float model does. What "
        "GPTQ, AWQ, bitsandbytes and their kin pack is not unpacked here, and a warning says so.",
        "Leave --densify out to keep them as they are in a .pth.",
    ),
    "cast-scaled": Explanation(
        "weights were cast without their scales",
        "Weights of a few bits (FP8, int8, 4 bits) are values only together with the scales of their blocks or rows, "
        "which stand beside them: weight_scale_inv, absmax, scales, SCB. Cast by themselves they are garbage to "
        "whoever multiplies them, and rounded scales change all values of a block.",
        "Dequantize with --densify, which knows those in FP8 and torch's own, or with the library that made them; or "
        "leave them as they are: --keep-dtype GLOB",
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
}


DIFFERENCES: dict[str, Explanation] = {
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
}


CHECKS: dict[str, Explanation] = {
    # What the policy says.
    "pickle-not-allowed": Explanation(
        "the file holds a pickle, and the policy allows none",
        "Loading a pickle runs the functions it names. Containers other than safetensors are pickles inside, harmless "
        "as this one may be.",
        "ckptkit convert FILE OUT.safetensors, and release that; or allow it for this file by an override.",
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
        "a tensor holds NaN, or a parameter Inf",
        "A model with such weights gives NaN for most inputs: its training diverged, or a cast to float16 overflowed. "
        "NaN is looked for in every tensor and numpy array of the file, Inf in parameters alone: attention masks and "
        "the observers of quantization hold it on purpose.",
        "Release an earlier checkpoint, or cast to bfloat16 in place of float16.",
    ),
    "copies-differ": Explanation(
        "files of a sharded checkpoint hold different copies of one value",
        "What every rank has a copy of must be the same in all files, and a DeepSpeed weight must be its fp32 master "
        "in the weight's dtype. Where they differ, ranks of different runs or steps lie in one folder, two files were "
        "swapped, or one is damaged.",
        "Get the files of all ranks again, from the same step of the same run.",
    ),
    "damaged": Explanation(
        "bytes of a tensor are not those that their checksum was recorded for",
        "torch's archives record a CRC-32 of every storage, and torch.load passes over it: one flipped bit loads as a "
        "weight of 6e36. Whoever reads the bytes here holds them against it. A file that was edited in place, through "
        "a shared mapping of torch's, is valid all the same and has stale checksums.",
        "Get the file anew. Where it was edited on purpose: --ignore-checksums (in a configuration: ignore-checksums), "
        "and ckptkit convert FILE OUT --ignore-checksums records fresh ones.",
    ),
    "malformed-value": Explanation(
        "parts of a quantized, sparse or nested tensor do not fit each other",
        "torch rebuilds such a tensor from its parts and checks none: an index of 10^9 in a 4 by 4 tensor reads or "
        "writes memory that is not its own. Here indices, offsets, axes and sizes are looked at first.",
        "Save the tensor anew where it was made; ckptkit convert FILE OUT --exclude NAME leaves it out.",
    ),
    "optimizer-not-allowed": Explanation(
        "the file holds the state of an optimizer",
        "It is needed to resume training, not to run the model, and takes up to twice the space of the weights.",
        "ckptkit convert FILE OUT --weights-only",
    ),
    "prefix-not-allowed": Explanation(
        "names carry a wrapper's prefix, and the policy allows none",
        "`module.` is what DataParallel and DistributedDataParallel put before every name, `_orig_mod.` torch.compile; "
        "`_forward_module.`, `_fsdp_wrapped_module.` and `_checkpoint_wrapped_module.` are others. The bare model does "
        "not load such names.",
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
    # Files and manifest.
    "file-unreadable": Explanation(
        "the file cannot be read",
        "It is not there, is not a checkpoint, is damaged, or is refused because readers of it disagree. Nothing is "
        "known of it, so the exit code is 2.",
        "The message says what the file is and what helps; ckptkit inspect FILE says the same.",
    ),
    "nothing-selected": Explanation(
        "there is nothing to check",
        "A folder holds no checkpoint files, or the manifest names none. Nothing checked is never a success.",
        "Correct the path.",
    ),
    "worker-died": Explanation(
        "the process that checked the file ended",
        "The file was tried twice, the second time alone, and the process was killed or crashed both times, as a rule "
        "for want of memory. The other files were checked; nothing is known of this one, so the exit code is 2.",
        "Check the file alone, with more memory: ckptkit check FILE --jobs 1",
    ),
    "timed-out": Explanation(
        "checking the file took longer than --timeout allows",
        "It lies on a disk or a server that does not answer, or it is large and is read as a whole. The other files "
        "were checked; nothing is known of this one, so the exit code is 2.",
        "Check the file alone, with a longer --timeout; --resume FILE keeps the results of the others.",
    ),
    "worker-version": Explanation(
        "a worker has another version of ckptkit",
        "With executor= the work is done where the executor's workers are. What another version finds is not what this "
        "one would find, so it is not taken.",
        "Install the same version of ckptkit for all workers.",
    ),
    "worker-failed": Explanation(
        "a worker could not check the file",
        "An error that is none of the file's: too little memory, an executor that was shut down, or a bug in ckptkit. "
        "The message says which. Nothing is known of the file, so the exit code is 2.",
        "Check the file alone: ckptkit check FILE --jobs 1 --debug",
    ),
    "results-incomplete": Explanation(
        "a run did not come to its end",
        "Its JSON Lines have no last line, or fewer results than that says: the run was ended, or the file was cut. "
        "What it has not told of may be anything, so the whole is not green.",
        "Run it again with --resume FILE, which looks only at what is not in it yet.",
    ),
    "part-missing": Explanation(
        "no run has told of a part of the files",
        "The runs are parts of a job array (--part I/N), and not all of the N are there. Files in the others may be "
        "anything, so the whole is not green.",
        "Run the missing parts, and report on all files together: ckptkit report FILES",
    ),
    "results-differ": Explanation(
        "runs by different versions of ckptkit, or against different policies or manifests",
        "What one of them lets pass the other might not. One verdict on both would say of some files what nobody has "
        "checked.",
        "Run those that differ again, with the same ckptkit and the same options; or report on each alone.",
    ),
    "whole-checked": Explanation(
        "a shard was named, and the checkpoint that it is a part of was checked",
        "A shard holds some of the tensors. Where the index that names it lies beside it, rules and manifest are held "
        "against all of them together.",
        "-",
    ),
    "file-missing": Explanation(
        "a file of the manifest is not there",
        "It was released, and is not in the folder now.",
        "Bring it back, or take it out of the manifest with ckptkit manifest --update.",
    ),
    "file-extra": Explanation(
        "a checkpoint file that is not in the manifest",
        "It lies in a folder that the manifest was made of, or was named, and nobody has recorded what it must be.",
        "Take it away, or record it with ckptkit manifest --update.",
    ),
    "file-rewritten": Explanation(
        "other bytes than released, but the same tensors",
        "The file's hash is not the manifest's, the content digest is: names, dtypes, shapes and values are equal. It "
        "was converted, saved again, or something else in it was changed; where the manifest has a whole digest, the "
        "message says which.",
        "If that is meant, record it with ckptkit manifest --update; ckptkit diff --strict shows all that differs.",
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

"""Explanations of the findings of ``ckptkit convert``, ``ckptkit diff`` and ``ckptkit check``."""

from __future__ import annotations

from ckptkit.report import Explanation

__all__ = ["CHECKS", "CONVERSION", "DIFFERENCES"]

CONVERSION: dict[str, Explanation] = {
    "left-out": Explanation(
        "parts of the source that are not in the output",
        "These were stored beside the weights (optimizer, scheduler, epoch, arguments) and left out on request; from "
        "a program, only the weights are written. Training cannot be resumed from the output alone.",
        "Write a .pth without --weights-only and --leave-out to keep them.",
    ),
    "weights-left-out": Explanation(
        "weights that are not in the output",
        "The source contains weights besides the selected ones, and they are not copies: a generator, a likelihood, "
        "a second model. The output contains only the selected weights; a model that needs both is missing one.",
        "Convert each with --section NAME, or write a .pth without --weights-only, which keeps them all.",
    ),
    "attributes-left-out": Explanation(
        "tensors in attributes or objects that are not in the output",
        "They belong to no section: attributes of a module or a tensor, buffers that a module does not save, parts "
        "of objects. A state_dict does not include them, so the output does not either.",
        "A .pth written from a file that holds the model in a dict keeps the model as it is, without --weights-only, "
        "--rename, --dtype and --include.",
    ),
    "module-left-out": Explanation(
        "a model is written as its state_dict",
        "The source contains the model itself, with its class and settings. Names, dtypes and selections apply to a "
        "state_dict, so a state_dict is written.",
        "Without --weights-only, renaming, --dtype, --include and --exclude, a .pth keeps the model as it is.",
    ),
    "not-converted": Explanation(
        "a file in a folder could not be converted",
        "It is damaged, has several sections or none, or has something the output cannot store; the message says "
        "which. Nothing was written for it, and the other files were converted.",
        "Convert the file alone, with the option that the message names: ckptkit convert FILE DST/.",
    ),
    "hostile-output": Explanation(
        "the output names functions that run, import or open things",
        "A .pth keeps everything in the source, including whatever the source would run when loaded with pickle. "
        "ckptkit ran none of it, but it is in the output just as it was in the source.",
        "Write a .safetensors, or leave out the parts that contain the names: --weights-only, --leave-out KEY, "
        "--exclude GLOB.",
    ),
    "all-tensors": Explanation(
        "every tensor of the file, named by the keys that lead to it",
        "--all-tensors combines everything in dicts, lists, tuples, objects and several sections into one flat "
        "state_dict: optimizer.state.3.exp_avg, 0, generator.conv.weight. Nothing else is in it.",
        "A .pth written without --all-tensors keeps everything in its place.",
    ),
    "kept-beside": Explanation(
        "plain values beside the weights, kept in the output",
        "--keep-beside keeps numbers, text, lists, tuples, dicts, sets and argument namespaces: in a .safetensors as "
        "JSON in the metadata, under ckptkit_beside. A .pth written from it puts them back in their places.",
        "-",
    ),
    "not-kept": Explanation(
        "parts beside the weights that are not plain values",
        "--keep-beside keeps what plain Python can rebuild from text. Tensors, optimizers with state and objects of "
        "other classes cannot be kept that way, nor can anything that takes more than one MiB of text.",
        "Write a .pth, which keeps everything, or leave them out by name: --leave-out KEY",
    ),
    "plain-values": Explanation(
        "numbers or text among the tensors of a state_dict",
        "Some models keep settings among their weights (height, use_mask). A .pth keeps them in place; a "
        ".safetensors can only store tensors.",
        "--keep-beside writes them into the metadata of the .safetensors, and back into a .pth made from it.",
    ),
    "replaced": Explanation(
        "the weights replaced what was stored under a key",
        "--as KEY puts the selected weights under a key of the output. What the source had under that key is gone: "
        "for example, the raw weights when their average was promoted.",
        "To keep both, give --as a key that is not in use.",
    ),
    "renamed": Explanation(
        "tensors were renamed",
        "The names in the output differ from the source's as the options asked; order and values are unchanged.",
        "-",
    ),
    "nothing-renamed": Explanation(
        "the rules change no name",
        "No regular expression of --rename or --rename-file matches any name. Usually the names are not what you "
        "expected, or a prefix is missing from the expression.",
        "ckptkit inspect FILE --flat lists the names; --dry-run shows what each rule would do.",
    ),
    "nothing-moved": Explanation(
        "nothing in the file is on a device that you asked to map",
        "--map-location OLD=NEW compares the whole tag, as torch.load's map_location does: cuda is not cuda:0.",
        "ckptkit inspect FILE shows which devices there are; --map-location NEW alone maps all of them.",
    ),
    "nothing-to-strip": Explanation(
        "no name has the prefix",
        "No name begins with the prefix to strip; the names are written unchanged.",
        "-",
    ),
    "mixed-prefix": Explanation(
        "only some names have the prefix",
        "Names with and without the prefix are mixed; only those that had it were changed. Often two models were "
        "merged, or only a submodule was wrapped.",
        "Check the result against the model: ckptkit verify OUT --model REF",
    ),
    "dropped": Explanation(
        "tensors were left out of the output",
        "They match --exclude, or match no --include. A model that has them cannot load the output with strict=True.",
        "Check the result against the model: ckptkit verify OUT --model REF --allow-missing GLOB",
    ),
    "like-reference": Explanation(
        "the output contains exactly the tensors of the reference",
        "--like REF found every tensor of the model, by name and shape, in one section and with one change of names. "
        "Everything else in the file (heads, queues, averages, training state) is left out and listed.",
        "ckptkit verify OUT --model REF also loads the weights and runs the model.",
    ),
    "nothing-excluded": Explanation(
        "a pattern of --exclude matches no name",
        "It left nothing out. Patterns are globs over whole names: `head` matches that one name alone, `head.*` "
        "matches everything that begins with `head.`, and case matters.",
        "ckptkit inspect FILE --flat lists the names.",
    ),
    "written-out": Explanation(
        "tensors that were written in another form",
        "safetensors stores contiguous little-endian tensors only; transposed, expanded, conjugated and overlapping "
        "views and big-endian tensors keep their values in the output, each with its own bytes.",
        "-",
    ),
    "untied": Explanation(
        "tensors with several names are no longer tied",
        "torch.distributed.checkpoint saves a tensor under each of its names and does not record which are the same. "
        "Each name has the same values in the output, with its own bytes.",
        "The model ties them again when it loads them. --tied error refuses such tensors.",
    ),
    "flattened": Explanation(
        "a tree as torch.distributed.checkpoint stores it",
        "Its planner saves values under the keys that lead to them. Dicts of other classes become plain ones and "
        "lose their attributes (such as the module versions of a state_dict); keys that are not text become text; an "
        "empty dict disappears. torch.distributed.checkpoint.save does the same.",
        "A .pth keeps all of it.",
    ),
    "compacted": Explanation(
        "bytes that no tensor uses were left out",
        "torch.save writes whole storages, even when only a small slice is kept. The output's storages contain only "
        "what tensors use; values, strides and sharing are unchanged.",
        "-",
    ),
    "other-hard-links": Explanation(
        "the replaced file has other names, which keep the old content",
        "A file may have several names: hard links (ln, cp -l, rsync --link-dest). A conversion writes a new file and "
        "gives it the name when it is complete. The other names still lead to the old file: what reads it by one of "
        "them sees nothing of the conversion, and its space is not freed.",
        "find FOLDER -samefile FILE lists the names before the conversion; afterwards, link them to the new file again "
        "if they should have its content: ln -f FILE OTHER",
    ),
    "not-sharded": Explanation(
        "one file, although an index of shards was asked for",
        "The whole output fits into one file of the size allowed for a shard, and a single file needs no index.",
        "Use the file, or give a smaller --max-shard-size.",
    ),
    "densified": Explanation(
        "tensors stored in another form were made dense",
        "Sparse tensors were filled in with their zeros, nested ones padded with zeros to one size, and low-bit "
        "numbers multiplied by their scales, as torch's to_dense(), to_padded_tensor(0) and dequantize() do. The "
        "output contains plain tensors; it is larger, and only the float model can load it, not a quantized module. "
        "Weights packed by GPTQ, AWQ, bitsandbytes and similar are not unpacked here, and a warning says so.",
        "Omit --densify to keep them as they are in a .pth.",
    ),
    "cast-scaled": Explanation(
        "weights were cast without their scales",
        "Low-bit weights (FP8, int8, 4 bits) are meaningful only with the scales of their blocks or rows, which are "
        "stored beside them: weight_scale_inv, absmax, scales, SCB. If the weights are cast alone, multiplying them "
        "by the scales gives garbage, and a rounded scale changes every value of its block.",
        "Dequantize with --densify, which supports FP8 and torch's own formats, or with the library that made them; "
        "or leave them as they are: --keep-dtype GLOB",
    ),
    "cast-overflow": Explanation(
        "values too large for the new dtype",
        "The cast turned them into infinity or, in float8 types that have none, into NaN or the largest value. One "
        "infinite weight can turn every output into NaN. float16 ends at 65,504; bfloat16 and float32 reach 3.4e38.",
        "Cast to bfloat16, or leave these tensors as they are: --keep-dtype GLOB",
    ),
    "cast-rounded": Explanation(
        "values that the new dtype cannot represent",
        "They were rounded to the nearest value of the new dtype, ties to even, as torch does; those too small for "
        "it became zero. Casting back does not restore them.",
        "Compare the outputs of a forward pass: ckptkit verify OUT --model REF",
    ),
}


DIFFERENCES: dict[str, Explanation] = {
    "prefix-differs": Explanation(
        "the names differ by a wrapper's prefix",
        "One file was saved from a model inside DataParallel, DistributedDataParallel or torch.compile, the other "
        "was not. All tensors then have different names, although they may be the same.",
        "Compare without the prefixes: ckptkit diff A B --strip-module",
    ),
    "not-compared": Explanation(
        "something could not be compared",
        "A tensor is a view of far more elements than are stored, or has a type whose values cannot be computed, or "
        "an object is too large to compare. What could not be compared does not count as equal.",
        "Look at it with ckptkit inspect in both files, or select other weights with --section.",
    ),
    "nan-appeared": Explanation(
        "NaN where there were numbers",
        "The second file has NaN in a tensor where the first has none: training diverged, or a cast overflowed.",
        "Do not release it: go back to an earlier checkpoint, or cast to a type with a larger range.",
    ),
    "ties-differ": Explanation(
        "tensors are tied in only one of the files",
        "In one file several names refer to one tensor; in the other each name has its own copy. The values may be "
        "equal, but training continues differently, and the file with the copies is larger.",
        "ckptkit convert --tied alias keeps ties, --tied duplicate resolves them.",
    ),
}


CHECKS: dict[str, Explanation] = {
    # What the policy says.
    "pickle-not-allowed": Explanation(
        "the file contains a pickle, and the policy allows none",
        "Loading a pickle runs the functions it names. Containers other than safetensors are pickles inside, even "
        "though this one may be harmless.",
        "ckptkit convert FILE OUT.safetensors, and release that; or allow it for this file with an override.",
    ),
    "trust-not-allowed": Explanation(
        "loading the file takes more trust than the policy allows",
        "`safe` files name only torch's own functions; `needs_trust` files name other classes too; `hostile` files "
        "name functions that run, import or open things, or can be read in two ways. No policy lets hostile files "
        "pass.",
        "ckptkit inspect FILE lists the names. ckptkit convert FILE OUT --weights-only leaves foreign objects out; do "
        "not load a hostile file.",
    ),
    "container-not-allowed": Explanation(
        "the policy does not allow this container",
        "--require-format (in a configuration: require-format) lists the containers that files may be in; a sharded "
        "set counts as whatever its shards are. The content decides what a file is, never its extension.",
        "ckptkit convert FILE OUT.safetensors, or with --to.",
    ),
    "file-too-large": Explanation(
        "the file is larger than the policy allows",
        "All files of a sharded set count together. Training state and unused bytes are the most common reasons for "
        "large files; ckptkit inspect FILE shows both.",
        "ckptkit convert FILE OUT --weights-only, or with --dtype or --max-shard-size.",
    ),
    "dtype-not-allowed": Explanation(
        "tensors of a dtype that the policy does not allow",
        "--allow-dtype lists the dtypes that the weights may have. BatchNorm's num_batches_tracked is int64, and so "
        "are many index buffers.",
        "Cast with ckptkit convert FILE OUT --dtype, or allow the dtype too.",
    ),
    "values-not-finite": Explanation(
        "a tensor contains NaN, or a parameter contains Inf",
        "A model with such weights gives NaN for most inputs: training diverged, or a cast to float16 overflowed. "
        "Every tensor and numpy array in the file is searched for NaN, but only parameters for Inf: attention masks "
        "and quantization observers contain Inf on purpose.",
        "Release an earlier checkpoint, or cast to bfloat16 instead of float16.",
    ),
    "copies-differ": Explanation(
        "the files of a sharded checkpoint have different copies of one value",
        "A value that every rank has a copy of must be the same in all files, and a DeepSpeed weight must equal its "
        "fp32 master in the weight's dtype. If they differ, one folder mixes ranks of different runs or steps, two "
        "files were swapped, or one is damaged.",
        "Download or copy the files of all ranks again, from the same step of the same run.",
    ),
    "damaged": Explanation(
        "the bytes of a tensor do not match their recorded checksum",
        "torch's archives record a CRC-32 for every storage, but torch.load ignores it: one flipped bit loads as a "
        "weight of 6e36. ckptkit checks it whenever it reads the bytes. A file edited in place, through one of "
        "torch's shared mappings, is still valid but has stale checksums.",
        "Download or copy the file again. If it was edited on purpose: --ignore-checksums (in a configuration: "
        "ignore-checksums), and ckptkit convert FILE OUT --ignore-checksums records fresh ones.",
    ),
    "malformed-value": Explanation(
        "parts of a quantized, sparse or nested tensor do not fit together",
        "torch rebuilds such a tensor from its parts without checking them: an index of 10^9 in a 4 by 4 tensor "
        "reads or writes memory outside the tensor. ckptkit checks indices, offsets, axes and sizes first.",
        "Save the tensor again where it was made; ckptkit convert FILE OUT --exclude NAME leaves it out.",
    ),
    "optimizer-not-allowed": Explanation(
        "the file contains optimizer state",
        "It is needed to resume training, not to run the model, and takes up to twice the space of the weights.",
        "ckptkit convert FILE OUT --weights-only",
    ),
    "prefix-not-allowed": Explanation(
        "names have a wrapper's prefix, and the policy allows none",
        "DataParallel and DistributedDataParallel put `module.` before every name, and torch.compile `_orig_mod.`; "
        "`_forward_module.`, `_fsdp_wrapped_module.` and `_checkpoint_wrapped_module.` are others. The bare model "
        "cannot load such names.",
        "ckptkit convert FILE OUT --strip-module",
    ),
    "location-not-allowed": Explanation(
        "storages are tagged with a device that the policy does not allow",
        "torch.load puts each storage on the device of its tag, and fails on a machine without it.",
        "ckptkit convert FILE OUT --map-location cpu",
    ),
    "check-not-run": Explanation(
        "a rule could not be applied",
        "It neither passed nor failed: the model cannot be built, no model is known, or the values have a type that "
        "cannot be computed. The exit code is 2.",
        "The message says what is missing: --fits REF, --model-arg, --input-shape, or an installed package.",
    ),
    # Files and manifest.
    "file-unreadable": Explanation(
        "the file cannot be read",
        "It does not exist, is not a checkpoint, is damaged, or is refused because programs would read it in "
        "different ways. Nothing is known about it, so the exit code is 2.",
        "The message says what the file is and what helps; so does ckptkit inspect FILE.",
    ),
    "nothing-selected": Explanation(
        "there is nothing to check",
        "A folder contains no checkpoint files, or the manifest names none. Checking nothing is never a success.",
        "Correct the path.",
    ),
    "worker-died": Explanation(
        "the process that checked the file ended",
        "The file was tried twice, the second time alone, and the process was killed or crashed both times, usually "
        "because it ran out of memory. The other files were checked; nothing is known about this one, so the exit "
        "code is 2.",
        "Check the file alone, with more memory: ckptkit check FILE --jobs 1",
    ),
    "timed-out": Explanation(
        "checking the file took longer than --timeout allows",
        "It is on a disk or a server that does not respond, or it is large and has to be read completely. The other "
        "files were checked; nothing is known about this one, so the exit code is 2.",
        "Check the file alone, with a longer --timeout; --resume FILE keeps the results of the others.",
    ),
    "worker-version": Explanation(
        "a worker has another version of ckptkit",
        "With executor=, the work is done where the executor's workers are. Another version might find "
        "something different, so its results are not used.",
        "Install the same version of ckptkit for all workers.",
    ),
    "worker-failed": Explanation(
        "a worker could not check the file",
        "The file did not cause the error: there was too little memory, the executor was shut down, or ckptkit has a "
        "bug. The message says which. Nothing is known about the file, so the exit code is 2.",
        "Check the file alone: ckptkit check FILE --jobs 1 --debug",
    ),
    "results-incomplete": Explanation(
        "a run did not finish",
        "Its JSON Lines have no last line, or fewer results than that line says: the run was interrupted, or the "
        "file was truncated. Files it did not report on may have any problem, so the overall result is not green.",
        "Run it again with --resume FILE, which checks only what is not in it yet.",
    ),
    "part-missing": Explanation(
        "no run reported on a part of the files",
        "The runs are parts of a job array (--part I/N), and some of the N are missing. Files in the missing parts "
        "may have any problem, so the overall result is not green.",
        "Run the missing parts, and report on all of the runs together: ckptkit report FILES",
    ),
    "results-differ": Explanation(
        "runs by different versions of ckptkit, or against different policies or manifests",
        "What one of them accepts, the other might not. A combined verdict would claim checks that nobody made.",
        "Repeat the runs that differ, with the same ckptkit and the same options; or report on each alone.",
    ),
    "whole-checked": Explanation(
        "a shard was named, and the checkpoint it belongs to was checked",
        "A shard contains some of the tensors. When the index that names it is in the same folder, rules and "
        "manifest apply to all shards together.",
        "-",
    ),
    "file-missing": Explanation(
        "a file in the manifest is missing",
        "It was released, but is not in the folder now.",
        "Restore it, or remove it from the manifest with ckptkit manifest --update.",
    ),
    "file-extra": Explanation(
        "a checkpoint file that is not in the manifest",
        "It is in a folder that the manifest covers, or was named, and nobody has recorded what it must be.",
        "Remove it, or record it with ckptkit manifest --update.",
    ),
    "file-rewritten": Explanation(
        "different bytes than released, but the same tensors",
        "The file's hash is not the one in the manifest, but the content digest is: names, dtypes, shapes and values "
        "are equal. It was converted or saved again, or something else in it was changed; if the manifest has a "
        "whole digest, the message says which.",
        "If that is intended, record it with ckptkit manifest --update; ckptkit diff --strict shows everything that "
        "differs.",
    ),
    "file-changed": Explanation(
        "different bytes than released, in a file without tensors",
        "Without tensors there is no content digest, so all that is known is that the file is different.",
        "Restore the released file, or record this one with ckptkit manifest --update.",
    ),
    "tensors-differ": Explanation(
        "the tensors are not those that were released",
        "Names, dtypes, shapes or values differ from the manifest. The message says which tensors if the manifest "
        "was written with --digests tensor.",
        "Restore the released file; if the change is intended, ckptkit manifest --update records it, and ckptkit "
        "diff shows how large it is.",
    ),
    "trust-worse": Explanation(
        "loading the file takes more trust than when it was released",
        "The manifest records how much trust loading the file takes; now it names more than it did then.",
        "Use ckptkit inspect to see the names, and find out who put them into it before anybody loads it.",
    ),
    "manifest-contradicts": Explanation(
        "the manifest's description does not match the file with its hash",
        "The file has exactly the bytes whose hash is recorded, but its container, kind or tensors are not as "
        "recorded. The manifest was edited by hand, or merged incorrectly.",
        "Compare the file with the release, then write the entry again with ckptkit manifest --update --force.",
    ),
    "golden-changed": Explanation(
        "the recorded outputs are missing or not those of the manifest",
        "The manifest names a file of outputs (ckptkit verify --write-golden) by path and hash.",
        "Restore the file, or record it again.",
    ),
}

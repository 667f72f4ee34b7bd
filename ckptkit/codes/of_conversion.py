"""What the findings of ``ckptkit convert`` mean."""

from __future__ import annotations

from ckptkit.codes.explanation import Explanation

__all__ = ["CODES"]

CODES: dict[str, Explanation] = {
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
    "hostile-output": Explanation(
        "the output names what runs, imports or opens",
        "A .pth keeps everything that is in the source, and with it what the source would run when it is loaded with "
        "pickle. ckptkit ran nothing of it; it is in the output as it was in the source.",
        "Write a .safetensors, or leave out what holds the names: --weights-only, --leave-out KEY, --exclude GLOB.",
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
    "cast-scaled": Explanation(
        "weights were cast without their scales",
        "Weights of a few bits (FP8, int8, 4 bits) are values only together with the scales of their blocks or rows, "
        "which stand beside them: weight_scale_inv, absmax, scales, SCB. Cast by themselves they are garbage to "
        "whoever multiplies them, and rounded scales change all values of a block.",
        "Dequantize with the library that made them, or leave them as they are: --keep-dtype GLOB",
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

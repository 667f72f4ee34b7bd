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
        "the model was saved inside DataParallel or DistributedDataParallel",
        "Every name begins with the wrapper's attribute, `module.`; the bare model does not know these names.",
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
        "Convert to .pth, or rebuild these parts in the program that loads the weights.",
    ),
    # Names and devices.
    "module-prefix": Explanation(
        "names carry a wrapper's prefix",
        "DataParallel and DistributedDataParallel put `module.` before every name, torch.compile `_orig_mod.`. "
        "load_state_dict then reports every key missing and every key unexpected; with strict=False it loads nothing.",
        "ckptkit convert FILE OUT --strip-module",
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
        "ckptkit reads the tensors without them: ckptkit convert FILE OUT.safetensors. --weights-only drops them.",
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
    "unused-bytes": Explanation(
        "storages are larger than the tensors that view them",
        "torch.save writes the whole storage even where a small view of it is all that is kept.",
        "Converting to safetensors writes only what the tensors hold.",
    ),
    "big-endian": Explanation(
        "written on a big-endian machine",
        "Element bytes are in the reverse order of today's machines. They are turned round where values are written "
        "or loaded.",
        "-",
    ),
    # Conversion.
    "left-out": Explanation(
        "parts of the source that the output does not hold",
        "safetensors holds named tensors only: optimizer, scheduler, epoch, arguments and objects stay behind.",
        "Write a .pth to keep them.",
    ),
    "renamed": Explanation(
        "tensors were renamed",
        "The names in the output differ from the source's by the prefixes asked for; order and values do not.",
        "-",
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
    "written-out": Explanation(
        "views that were written out as tensors of their own",
        "safetensors stores contiguous tensors only; transposed, expanded and overlapping views hold the same values "
        "in the output, in their own bytes.",
        "-",
    ),
}

"""Explanations of the findings of ``ckptkit verify``."""

from __future__ import annotations

from ckptkit.report import Explanation

__all__ = ["CODES"]

CODES: dict[str, Explanation] = {
    "fit-coverage": Explanation(
        "how much of the model the checkpoint fills",
        "The number of tensors in the reference that get a value from the file, and their share of all parameter "
        "elements. Counters that torch sets itself do not count.",
        "-",
    ),
    "wrapper-prefix": Explanation(
        "the names have a prefix too many, or one too few",
        "DataParallel, torch.compile or an outer module put a prefix before every name. After the rename "
        "shown, most or all tensors fit.",
        "Run the convert command shown, or verify with --strip-module.",
    ),
    "identified": Explanation(
        "the reference model was identified by the checkpoint's names and shapes",
        "No model was named, and a known architecture has exactly these names and shapes. inspect lists others that "
        "fit equally well.",
        "If it must be a particular model, name it with --model.",
    ),
    "old-names": Explanation(
        "the names are those of another release of the library",
        "Layers had other names when the file was made than they have today. After the rename shown, most or all "
        "tensors fit.",
        "Run the convert command shown; it changes only names.",
    ),
    "another-section": Explanation(
        "other weights in the same file fit the reference",
        "The file contains several sets of weights, such as raw ones and their moving average (EMA), or a generator "
        "and a discriminator; a set other than the selected one fits.",
        "Choose it with --section, as the command shown does.",
    ),
    "another-architecture": Explanation(
        "the checkpoint is for a different model than the reference",
        "All of its names and shapes are those of another model that torchvision or timm has: a sibling of another "
        "depth or width, or another release of it.",
        "Verify it with the reference that the command shown names, or use the checkpoint that belongs to your model.",
    ),
    "other-weights": Explanation(
        "the file contains more weights than were verified",
        "Only the file's authors can say which of them to use: moving averages (EMA) are usually the better ones.",
        "Verify the others too, with --section.",
    ),
    "nothing-matches": Explanation(
        "no tensor of the reference is in the checkpoint",
        "No name matches and no prefix explains it: it is another architecture, or a reference without tensors. "
        "Allow patterns never silence this.",
        "Name the right reference, or the right --section.",
    ),
    "missing-keys": Explanation(
        "the reference has tensors that the checkpoint lacks",
        "They would keep random values.",
        "Correct the reference or its arguments (for example, aux_logits=False), or use --allow-missing GLOB if this "
        "is intended.",
    ),
    "unexpected-keys": Explanation(
        "the checkpoint has tensors that the reference lacks",
        "A load with strict=False would drop them silently.",
        "ckptkit convert FILE OUT --like REF leaves them out. Or correct the reference or its arguments (for "
        "example, aux_loss=True), or use --allow-unexpected GLOB if this is intended.",
    ),
    "shape-mismatch": Explanation(
        "same names, different shapes",
        "If only a head differs, the layer and both sizes are named; otherwise it is another variant of the model.",
        "Build the reference to match: --model-arg num_classes=N.",
    ),
    "dtype-mismatch": Explanation(
        "the checkpoint's dtype is not the reference's",
        "torch casts within one kind of number when it loads, which may round. A cast between kinds (integers to "
        "floats, complex to real) would change values, so it is an error.",
        "--dtype checks in the file's own precision.",
    ),
    "unloadable-value": Explanation(
        "a value is not a plain tensor",
        "The reference has a plain tensor where the file has a quantized, sparse or foreign value, or one of another "
        "layout or shape; or only other code can build what the file contains.",
        "Save that value as a dense tensor.",
    ),
    "extra-state": Explanation(
        "a module's extra state was not loaded",
        "A module's `_extra_state` in the file is an object of a custom class, which ckptkit never builds; the model "
        "keeps its own. Plain values and tensors there are loaded.",
        "Set it in the factory if outputs depend on it.",
    ),
    "tied-restored": Explanation(
        "names restored from tied ones",
        "A name that is missing from the file is, in the model, the same tensor as a name that the file has: "
        "safetensors stores it once.",
        "-",
    ),
    "batch-counters": Explanation(
        "BatchNorm counters that torch sets to 0",
        "`num_batches_tracked` is not in the file, and neither is a layer version that includes it: torch's strict "
        "load then sets it to 0. Evaluation does not use it.",
        "-",
    ),
    "upgraded-keys": Explanation(
        "the reference's own code renamed or converted keys",
        "Modules upgrade older names and formats while they load.",
        "Saving the loaded model again writes the current ones.",
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
        "The fit has errors, and ckptkit never loads a partial fit.",
        "Fix the errors first.",
    ),
    "load-failed": Explanation(
        "load_state_dict refused the weights",
        "The model's own loading code raised an error, or ignored names. The message gives the reason.",
        "Fix the file, or the loading code.",
    ),
    "left-on-meta": Explanation(
        "a parameter or buffer got no value",
        "After loading, a parameter or buffer still has its initial value from the factory, or has no value at all: "
        "the model's loading code marks a name as done without storing the tensor, or the factory builds a buffer on "
        "the meta device that no checkpoint contains. The outputs of such a model are meaningless, or it does not "
        "run at all.",
        "Fix the model's loading code; let the factory build on the CPU.",
    ),
    "load-differs": Explanation(
        "the loaded model does not match the file",
        "After loading, a tensor differs from the file's bits or their cast: tied names have different values, or "
        "loading code changes them.",
        "Find out which before you trust either.",
    ),
    "weights-not-finite": Explanation(
        "the weights contain NaN or Inf",
        "A tensor contains NaN, or a parameter contains an infinity: training diverged, or the file is damaged.",
        "Use an earlier checkpoint.",
    ),
    "infinite-buffer": Explanation(
        "a buffer contains infinities",
        "This is common for masks; outside parameters it is not an error.",
        "-",
    ),
    "weights-all-zero": Explanation(
        "every matrix of the weights is zero",
        "Every parameter of two or more dimensions is zero throughout, so outputs cannot depend on inputs: an empty "
        "template was saved, or the values were too small for the dtype they were cast to.",
        "Use the checkpoint that was trained, or another dtype.",
    ),
    "zero-weights": Explanation(
        "some matrices of the weights are zero",
        "A parameter of two or more dimensions is zero throughout. Some layers start that way (the last of a "
        "residual branch, a new head), but training changes them.",
        "Make sure that the layers named were trained.",
    ),
    "negative-variance": Explanation(
        "a running variance is negative",
        "BatchNorm divides by its square root, which gives NaN: the file is damaged, or whole models, including "
        "their statistics, were averaged or subtracted.",
        "Recompute the statistics, or use another checkpoint.",
    ),
    "zero-variance": Explanation(
        "a running variance is zero",
        "The channel never changed in training (it is dead or pruned), and evaluation multiplies its values by "
        "1/sqrt(eps), about 300.",
        "Usually harmless; look at the layers named if outputs are extreme.",
    ),
    "output-shape": Explanation(
        "the outputs are not those of the reference",
        "For its documented inputs the model returns tensors of other shapes, or under other names, than it should.",
        "Compare --model and --model-arg with the model that the checkpoint was trained as.",
    ),
    "constant-output": Explanation(
        "the outputs do not depend on the input",
        "All elements have one value: an error unless that value is 0 or 1 (the limit of a ReLU or sigmoid) or a "
        "layer is zero. Or, as a warning, two different inputs give the same outputs bit for bit, as in models that "
        "were never trained.",
        "Look for layers that are zero or dead; try --input with real data.",
    ),
    "not-repeatable": Explanation(
        "a second run gives a different result",
        "The same input gave different outputs in eval mode, beyond the tolerance: something draws random numbers "
        "or keeps state between calls.",
        "Make the model's code respect eval mode, or seed its random numbers.",
    ),
    "batch-dependent": Explanation(
        "a row's result depends on the batch it is in",
        "The same row gave different outputs alone and beside another row: something is computed over the batch, or "
        "the input's first dimension is not a batch. This is a warning if the reference does not document its inputs.",
        "Look for BatchNorm without running statistics; give inputs with the batch dimension first.",
    ),
    "fixed-batch": Explanation(
        "the model does not accept another batch size",
        "It was made for one size, so ckptkit did not check whether rows are independent.",
        "-",
    ),
    "batch-not-compared": Explanation(
        "rows were not compared with those of another batch",
        "The outputs have no row for each row of the input, or are chosen by rank and threshold as a detector's are.",
        "-",
    ),
    "against-equal": Explanation(
        "both checkpoints give the same outputs",
        "Bit for bit, for the inputs shown.",
        "-",
    ),
    "against-close": Explanation(
        "both checkpoints give outputs within the tolerance",
        "They are not bit-equal: the rounding or the dtype differs, or the weights differ slightly. The message says "
        "how far apart they are, and names the first module whose output is not bit-equal.",
        "If they should be the same file, compare the weights.",
    ),
    "against-differs": Explanation(
        "the two checkpoints give different outputs",
        "They differ by more than the tolerance for the dtypes involved. The module named is the first, in the order "
        "of calls, whose output differs too much.",
        "Compare the weights of that module and of those before it; --atol and --rtol set another tolerance.",
    ),
    "against-not-loaded": Explanation(
        "the other checkpoint does not fit the model",
        "Its names, shapes or values do not fit the reference that the first one fits.",
        "Fix what the message says; ckptkit verify OTHER says more.",
    ),
    "against-unwrapped": Explanation(
        "a wrapper's prefix was removed for the comparison",
        "The names have a wrapper's prefix (module., _orig_mod.), and fit the reference without it.",
        "-",
    ),
    "device-equal": Explanation(
        "both devices give the same outputs",
        "Bit for bit, for the inputs shown.",
        "-",
    ),
    "device-close": Explanation(
        "both devices give outputs within the tolerance",
        "Devices add numbers in different orders, so outputs are rarely bit-equal.",
        "-",
    ),
    "device-differs": Explanation(
        "the devices give different outputs",
        "They differ by more than the tolerance, more than a different order of additions explains. The module named "
        "is the first whose output differs too much. This is a warning for detectors, where rounding may choose "
        "other boxes.",
        "Look at that module's operations on that device; --atol and --rtol set another tolerance.",
    ),
    "golden-equal": Explanation(
        "the outputs are those of the golden file",
        "Bit for bit.",
        "-",
    ),
    "golden-close": Explanation(
        "the outputs are those of the golden file within the tolerance",
        "Another machine, dtype or version rounds differently.",
        "-",
    ),
    "golden-differs": Explanation(
        "the outputs are not those of the golden file",
        "The same inputs give outputs beyond the tolerance, or of other shapes: these are other weights, or another "
        "model.",
        "Find out which is right; --write-golden --force records new ones.",
    ),
    "golden-weights": Explanation(
        "the weights are not those of the golden file",
        "The digests of these tensors, or their dtypes, are not those recorded; the outputs decide whether that "
        "matters. This is a warning unless it is only a cast to another dtype.",
        "ckptkit diff with the original tells how far apart they are; --write-golden --force records new ones.",
    ),
    "golden-versions": Explanation(
        "the golden file was recorded under other conditions",
        "Another version of torch, another device or another dtype computed it; results may differ within the "
        "tolerance.",
        "-",
    ),
    "golden-written": Explanation(
        "a golden file was written",
        "It contains the inputs' recipe or values, and the outputs (for large ones, an evenly spaced sample).",
        "ckptkit verify FILE --golden GOLDEN compares another checkpoint with it.",
    ),
    "golden-not-written": Explanation(
        "no golden file was written",
        "A model that does not pass cannot serve as a reference.",
        "Fix the errors first.",
    ),
    "unsafe-load": Explanation(
        "the pickled model's own code was run",
        "--unsafe-load asks torch.load to import and call what the file names. The message lists the names.",
        "Verify with a reference instead: --model REF",
    ),
    "pickled-differs": Explanation(
        "the loaded module does not match the file",
        "Its code changes tensors while it is loaded, so the weights in use are not those in the file.",
        "Verify with a reference instead: --model REF",
    ),
    "forward-ok": Explanation(
        "the forward pass gave finite outputs",
        "It ran with the input and on the device shown. This does not prove accuracy.",
        "-",
    ),
    "forward-failed": Explanation(
        "the forward pass raised an error",
        "Most often the input has the wrong shape, or the device does not support the dtype.",
        "Give --input-shape, --device or --dtype.",
    ),
    "output-not-finite": Explanation(
        "the outputs contain NaN or Inf",
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
}

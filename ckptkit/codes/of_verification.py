"""What the findings of ``ckptkit verify`` mean."""

from __future__ import annotations

from ckptkit.report import Explanation

__all__ = ["CODES"]

CODES: dict[str, Explanation] = {
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
        "ckptkit convert FILE OUT --like REF leaves them out. Or correct the reference or its arguments "
        "(aux_loss=True, say), or use --allow-unexpected GLOB where this is meant.",
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
        "a value is not a plain tensor",
        "The reference has a plain tensor where the file holds a quantized, sparse or foreign value, or one of another "
        "layout or shape; or only code from elsewhere can make what the file holds.",
        "Save that value as a dense tensor.",
    ),
    "extra-state": Explanation(
        "a module's extra state was not loaded",
        "What a module keeps under `_extra_state` is an object of somebody's class in the file and is never built; the "
        "model keeps its own.  Plain values and tensors there are loaded.",
        "Set it in the factory if outputs depend on it.",
    ),
    "tied-restored": Explanation(
        "names restored from tied ones",
        "A name that the file lacks is, in the model, the same tensor as one it has: safetensors stores it once.",
        "-",
    ),
    "batch-counters": Explanation(
        "BatchNorm counters that torch sets to 0",
        "`num_batches_tracked` is not in the file, and neither is a version of the layer that has it: torch's strict "
        "load then sets it to 0. Evaluation does not use it.",
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
        "Fix what the errors say first.",
    ),
    "load-failed": Explanation(
        "load_state_dict refused the weights",
        "The model's own loading code raised, or passed names over. The message holds its reason.",
        "Fix the file, or the loading code.",
    ),
    "left-on-meta": Explanation(
        "a parameter or buffer got no value",
        "After loading, something in the model is still what the factory made, or has no value at all: its own "
        "loading code takes a name off the list without storing the tensor, or the factory builds a buffer on the "
        "meta device that no checkpoint holds. Such a model computes with noise, or not at all.",
        "Fix the model's loading code; let the factory build on the CPU.",
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
        "Usual for masks; outside parameters it is not an error.",
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
        "the input's first dimension is not a batch. A warning where the reference does not document its inputs.",
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
        "Fix what the message says; ckptkit verify OTHER says more.",
    ),
    "against-unwrapped": Explanation(
        "a wrapper's prefix was taken off to compare",
        "The names carry a prefix of wrappers (module., _orig_mod.), and fit the reference without it.",
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
    "golden-weights": Explanation(
        "the weights are not the golden's",
        "Digests of these tensors, or their dtypes, are not those that were recorded; the outputs decide whether that "
        "matters. A warning, but for a mere cast to another dtype.",
        "ckptkit diff with the original tells how far they are apart; --write-golden --force records new ones.",
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
        "Fix what the errors say first.",
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
}

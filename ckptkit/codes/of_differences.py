"""What the findings of ``ckptkit diff`` mean."""

from __future__ import annotations

from ckptkit.codes.explanation import Explanation

__all__ = ["CODES"]

CODES: dict[str, Explanation] = {
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

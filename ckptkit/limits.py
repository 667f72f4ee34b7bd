"""Upper bounds on what a file may ask of the machine, each with its reason.

Every size read from a file is compared with one of these before it is used to allocate, loop or seek.  The bounds are
far above what honest checkpoints need and far below what hurts.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DEFAULT_LIMITS", "Limits"]


class Limits(NamedTuple):
    """Bounds for one read of one file."""

    pickle_nbytes: int = 128 << 20
    """Bytes of one pickle, and of all together that nothing refers to.  100,000 tensors take about 15 MiB; arrays
    pickled inline take more.  Text takes up to four times its bytes in memory."""

    opcodes: int = 10_000_000
    """Pickle instructions in one pickle.  A tensor takes about 35; this is some 280,000 tensors."""

    nodes: int = 2_000_000
    """Lists, tuples, dicts, sets, objects and pairs in one pickle.  A tensor brings about six of them."""

    marks: int = 500_000
    """Marks in a row, which nest tuples, dicts and calls.  Picklers recurse, so they end at some 1,000."""

    tree_nodes: int = 300_000
    """Lists, tuples, dicts and objects below one root; tensors are counted by `entries`.  A whole model has
    about fifteen for each of its modules, an optimizer two for each parameter."""

    int_nbytes: int = 1024
    """Bytes of one integer.  Real ones are at most 16; Python cannot print those over 4,300 digits
    and parses long ones in quadratic time."""

    name_nbytes: int = 4096
    """Bytes of a module or attribute name in a pickle, and of a record name in an archive."""

    compared_nodes: int = 1_000_000
    """Nodes in pairs that are compared in one pickle, where it drops the result of one call for that of another."""

    arguments: int = 1_000_000
    """Values that are examined in the arguments of one pickle's calls, if it matters what is passed to whom."""

    generated_characters: int = 16 << 20
    """Characters of generated code in one pickle; a large graph has one million."""

    names: int = 50_000
    """Different names in one pickle.  A large TorchScript archive has some 5,000 classes."""

    references: int = 2_000_000
    """How often nodes are referred to below one root: shared nodes count each time."""

    repeated_calls: int = 1000
    """Calls that are written again because their arguments lead back to them.  CPython's own pickler recurses for each,
    and stops before this many; without a bound the output grows with their square."""

    attribute_depth: int = 32
    """Tensors kept as attributes of tensors: one is rare; thirty levels of it are an attack."""

    module_depth: int = 1000
    """Modules inside modules: Python's own recursion limit stops ``state_dict()`` there."""

    entries: int = 300_000
    """Tensors in one file under all their names, and records in one archive.  The largest models known
    have about 100,000."""

    directory_nbytes: int = 80 << 20
    """Bytes of a zip central directory: `entries` records of a generous 256 bytes."""

    record_nbytes: int = 1 << 20
    """Bytes of a small record (``version``, ``byteorder``): they contain a few characters."""

    header_nbytes: int = 100_000_000
    """Bytes of a safetensors header: the safetensors library's own MAX_HEADER_SIZE."""

    dimensions: int = 64
    """Dimensions of a tensor: torch's own kernels stop at 64."""

    name_characters: int = 100_000_000
    """Characters of all tensors' names that are listed: 200 for each of 500,000."""

    json_values: int = 5_000_000
    """Values of a header or index in JSON, counted by its commas and opening brackets.  A tensor takes
    eight to ten; this is some 500,000 tensors, and the most that 1 GiB of memory has room for."""

    json_wide_nbytes: int = 25_000_000
    """Bytes of a text in JSON that may hold characters beyond U+FFFF: one of them makes every character take four
    bytes, in the text and in any string of it."""

    json_depth: int = 100
    """Levels of a JSON value that nothing reads; the Rust parser in safetensors stops at 128."""

    source_nbytes: int = 64 << 20
    """Bytes of a program's source that are searched; a model of 5,000 modules has about two million."""

    source_classes: int = 100_000
    """Classes in it; every module of a program may have its own."""

    index_nbytes: int = 64 << 20
    """Bytes of an index of shards.  100,000 tensors take about 12 MB."""

    shards: int = 10_000
    """Shards of one checkpoint.  The largest models known have under 1,000."""

    members: int = 50_000
    """Members of archives that are searched only for pickles.  Each takes some 50 microseconds."""

    looked_nbytes: int = 1 << 30
    """Bytes that are inflated for that, or searched for names: some seconds, and room on the disk."""

    unpacked_nbytes: int = 256 << 20
    """Bytes that a compressed file, or the members of an archive, may become however small it is: a second or two, and
    room on the disk.  The spool of one that claims more ends here."""

    unpacked_ratio: int = 100
    """How many times its own bytes a larger one may become, by all that is in it.  Weights shrink by a tenth to a half,
    those of a pruned model by ten, text by four; deflate can expand one byte to 1,032, bzip2, xz and zstd to tens of
    thousands."""

    levels: int = 4
    """How deep files inside one another are opened: ``.tar.gz`` is two; archives can hold themselves."""

    overlap: int = 64
    """How many times the bytes of its storage a view may have and still be processed: sliding windows of 64 still
    count, and a few bytes of a file cannot ask for terabytes to be read."""

    beside_nbytes: int = 1 << 20
    """Bytes of the plain values beside the weights that are kept as text in a header: names of classes, settings, a
    vocabulary of 50,000 words; each reader of the file parses them."""

    expanded_nbytes: int = 64 << 30
    """Bytes by which tensors may grow, all together, when they are written out contiguously.  Real
    expanded views come to megabytes; a stride of 0 lets four bytes claim terabytes of disk."""

    densified_nbytes: int = 256 << 30
    """Bytes by which values may grow, all together, where sparse and nested ones are made dense.  The adjacency matrix
    of 250,000 nodes takes 250 GB; a sparse tensor of a few bytes can claim any size."""


DEFAULT_LIMITS = Limits()

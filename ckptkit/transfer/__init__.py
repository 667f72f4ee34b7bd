"""What moves bytes: values as they are wanted, and plans carried out, so that a destination is old or complete.

`values` gives a tensor's values however they lie, `pieces` those of one that is in several files; `steps` carries out a
plan on an open file, `checksums` holds bytes against what was recorded of them, `replicas` copies against each
other; `writing` writes outputs so that nothing is half-written, `names` and `folders` give them their names once they
are complete; `memory` is what reads into, and out of, arrays, and `workers` are the threads.
"""

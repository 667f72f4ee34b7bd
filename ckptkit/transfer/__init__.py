"""Moves bytes: reads values, and carries out plans so that a destination is either old or complete.

`values` returns a tensor's values however they are stored, `pieces` those of one in several files; `steps` carries out
a plan on an open file, `checksums` checks bytes against their recorded checksums, and `replicas` compares copies;
`writing` writes outputs so that nothing is half-written, `names` and `folders` give them their names once they are
complete; `memory` reads into and out of arrays, and `workers` are the threads.
"""

"""Released weights: what they must be, and whether they are.

`selection` finds files, `examine` reads each once, `manifest` records what was read.
"""

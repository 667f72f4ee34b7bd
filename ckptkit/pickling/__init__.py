"""Pickles as data: bytes to an inert tree and back, with no name ever resolved.

- `inert`: the node types, and walking and mapping trees of them
- `reader`: bytes -> inert tree; `machine`: the stack machine it runs
- `popped`: what a pickle pops off its stack: calls for their effect, and discarded values
- `writer`: inert tree -> bytes
- `tensors`: torch's pickle vocabulary (storages, ``_rebuild_*``) <-> Storage and TensorEntry
- `legacy`: the rest of that vocabulary, which only files before torch 1.6 use
- `trust`: what a name in a pickle means for anyone who executes it
"""

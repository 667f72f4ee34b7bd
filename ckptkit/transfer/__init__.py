"""Executes a plan: bytes from file to file, into temporary files, then renamed.

`values` gives a tensor's values however they lie, `copier` moves bytes that stay as they are, `steps` carries
out a plan on an open file, `publish` writes and checks whole outputs, `names` gives complete files their names,
`workers` are the threads.
"""

from ckptkit.transfer.publish import write_atomically
from ckptkit.transfer.steps import Tally, execute
from ckptkit.transfer.values import stream

__all__ = ["Tally", "execute", "stream", "write_atomically"]

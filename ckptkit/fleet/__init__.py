"""Runs one function for each of a large number of tasks: in this process, in several, or on the user's own engine.

This room knows nothing about checkpoints.  `engine` is what others call; `driver` hands out the tasks and returns their
results in order; `pool` has our own processes, `executors` those of any `concurrent.futures.Executor`; `worker` runs in
either, and `outcome` is the result of a task.  Only pickled bytes are sent: every engine gets the same, and an error in
pickling is reported for the task it belongs to.
"""

from ckptkit.fleet.engine import cores, each
from ckptkit.fleet.outcome import Outcome

__all__ = ["Outcome", "cores", "each"]

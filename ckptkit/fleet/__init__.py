"""One piece of work for each of very many tasks: in this process, in several, or on the engine that a user has.

The room knows nothing of checkpoints.  `engine` is what others call; `driver` hands out the tasks and gives back what
came of them, in their order; `pool` has processes of our own, `executors` those of somebody else's
`concurrent.futures.Executor`; `worker` is what happens in either, and `outcome` what comes of a task.  What travels is
bytes, pickled by us: every engine gets the same, and what cannot be pickled is told of the task that it is about.
"""

from ckptkit.fleet.engine import cores, each
from ckptkit.fleet.outcome import Outcome

__all__ = ["Outcome", "cores", "each"]

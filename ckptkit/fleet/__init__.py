"""One piece of work for each of very many tasks: in this process, in several, or on the engine that a user has.

The room knows nothing of checkpoints.  `engine` hands out the tasks and gives back what came of them, in their order;
`pool` has processes of our own, `executors` those of somebody else's `concurrent.futures.Executor`; `worker` is what
happens in either.  What travels is bytes, pickled by us: every engine gets the same, and what cannot be pickled is told
of the task that it is about.
"""

from ckptkit.fleet.engine import Outcome, cores, each

__all__ = ["Outcome", "cores", "each"]

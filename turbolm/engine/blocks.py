"""KV blocks as sequences at work use them: taken as they grow, shared where their tokens are the same."""

from __future__ import annotations

from turbolm.cache.block_pool import BlockPool
from turbolm.cache.prefix_cache import match
from turbolm.engine.job import Job
from turbolm.engine.step import ScheduledSequence


class Blocks:
    """Who has which block. It decides nothing: what to do when none is left is the scheduler's matter."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool) -> None:
        self.pool = BlockPool(num_blocks)
        self._size = block_size
        self._prefix_cache = prefix_cache
        self._pending: dict[bytes, int] = {}  # key of a block being computed → number of the step that does

    def match(self, job: Job) -> list[int]:
        """The cached blocks that `job` may begin with. They still have to be acquired (`start`)."""
        return match(self.pool, job.keys, job.num_shareable) if self._prefix_cache else []

    def start(self, job: Job, hits: list[int]) -> None:
        """The job begins with these cached blocks."""
        self.pool.acquire(hits)
        job.sequence.blocks = hits
        job.sequence.num_computed = job.num_scheduled = len(hits) * self._size

    def num_missing(self, job: Job, hits: list[int], reserve: int) -> int:
        """How many blocks are missing to start `job`, given its cached blocks and `reserve` blocks that
        others need; 0 or less: none."""
        return job.num_needed - len(hits) + reserve - (self.pool.num_available - self.pool.count_idle(hits))

    def grow(self, job: Job, num_tokens: int) -> bool:
        """Takes what the job lacks for so many leading tokens; False, and nothing taken, where that isn't there."""
        blocks = job.sequence.blocks
        num_missing = -(-num_tokens // self._size) - len(blocks)
        if num_missing > self.pool.num_available:
            return False
        if num_missing > 0:
            blocks.extend(self.pool.allocate(num_missing))
        return True

    def release(self, job: Job) -> None:
        self.pool.release(reversed(job.sequence.blocks))
        job.sequence.blocks = []

    def gain(self, job: Job) -> int:
        """How many blocks nobody would own or need any more without this running job."""
        return self.pool.count_sole(job.sequence.blocks) + job.num_wanted

    def announce(self, job: Job, item: ScheduledSequence, step: int) -> None:
        """Step number `step` computes a prompt's chunk: those who need the same blocks may wait for it."""
        if self._prefix_cache:
            for index in self._filled(item):
                self._pending.setdefault(job.keys[index], step)

    def retract(self, job: Job, item: ScheduledSequence, step: int) -> None:
        """That step is over, for better or worse."""
        if self._pending:
            for index in self._filled(item):
                if self._pending.get(job.keys[index]) == step:
                    del self._pending[job.keys[index]]

    def awaits(self, job: Job, index: int) -> bool:
        """Whether to leave `job` waiting because its block `index` is being computed in a step not updated
        yet. It waits for a block once: if that came to nothing, it computes the block itself."""
        if not self._pending or index >= job.num_shareable:
            return False
        step = self._pending.get(job.keys[index])
        if step is None or (index <= job.deferred[0] and step != job.deferred[1]):
            return False
        job.deferred = (index, step)
        return True

    def publish(self, job: Job, num_computed: int) -> None:
        """The K/V of so many leading tokens are there: the further blocks that they fill may be shared from now on."""
        if self._prefix_cache:
            for index in range(job.sequence.num_computed // self._size, num_computed // self._size):
                self.pool.publish(job.sequence.blocks[index], job.keys[index])

    def _filled(self, item: ScheduledSequence) -> range:
        """The blocks that are full with an item's tokens, and were not before."""
        return range(item.start // self._size, (item.start + item.num_new_tokens) // self._size)

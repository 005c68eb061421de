"""Which decodes of a step carry which drafts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from turbolm.engine.job import Job, OpenStep
from turbolm.engine.speculative import MAX_DRAFTS, MAX_ROWS, Drafter
from turbolm.engine.step import Step
from turbolm.types import Sequence


class Proposer(Protocol):
    """Guesses how several sequences go on, at a cost of its own."""

    def num_worth(self, sequence: Sequence, num_decodes: int) -> int:
        """How many drafts would save time in a step with `num_decodes` sequences."""

    def propose(self, wanted: list[tuple[Sequence, int]]) -> list[tuple[int, ...]]:
        """For each sequence at most so many tokens. There are slots for them in its blocks."""


class Drafting:
    """Drafts from the sequences' own texts, and where those have none, from a model."""

    def __init__(self, drafter: Callable[[list[int]], Drafter] | None, model: Proposer | None) -> None:
        """`drafter` makes, of a sequence's token ids, what guesses how it goes on."""
        self._drafter = drafter
        self._model = model

    def drafter_of(self, sequence: Sequence) -> Drafter | None:
        return None if self._drafter is None else self._drafter(sequence.token_ids)

    def awaits(self, running: list[Job], last: Step) -> bool:
        """Whether the next step has to wait for the last one: drafts are verified in it, or would follow the tokens
        that it samples. A step without those sequences would only take turns with theirs."""
        if (self._drafter is None and self._model is None) or len(running) > MAX_ROWS:
            return False
        if any(item.drafts for item in last.items):
            return True
        count = len(running)
        return any(job.num_left <= 0 and job.num_draftable > 1 and self._promises(job, count) for job in running)

    def _promises(self, job: Job, num_decodes: int) -> bool:
        if job.drafter is not None and job.drafter.promises(num_decodes):
            return True
        return self._model is not None and self._model.num_worth(job.sequence, num_decodes) > 0

    def add(self, open_step: OpenStep, spare_slots: Callable[[Job, int], int]) -> int:
        """Adds drafts to the decodes, from what is left of the step's limits; how many. `spare_slots` takes and counts
        slots for up to so many drafts of a job."""
        decodes, jobs = open_step.decodes, open_step.decode_jobs
        limit = min(MAX_ROWS - len(decodes), open_step.num_tokens, open_step.num_logit_rows)
        if (self._drafter is None and self._model is None) or limit < 1:
            return 0
        room, asked = limit, []
        for index, job in enumerate(jobs):
            most = min(-(-room // (len(decodes) - index)), MAX_DRAFTS, job.num_draftable)
            if most < 1 or decodes[index].follows:
                continue
            drafts = () if job.drafter is None else job.drafter.propose(most, len(decodes))
            drafts = drafts[: spare_slots(job, len(drafts))]
            wanted = 0
            if not drafts and self._model is not None:
                wanted = spare_slots(job, min(most, self._model.num_worth(job.sequence, len(decodes))))
            if wanted:
                asked.append((index, wanted))
            _put(open_step, index, drafts)
            room -= len(drafts) + wanted
        if asked and self._model is not None:
            proposed = self._model.propose([(jobs[index].sequence, wanted) for index, wanted in asked])
            for (index, _), drafts in zip(asked, proposed, strict=True):
                _put(open_step, index, drafts)
        return sum(len(item.drafts) for item in decodes)


def _put(open_step: OpenStep, index: int, drafts: tuple[int, ...]) -> None:
    if drafts:
        open_step.decodes[index] = open_step.decodes[index]._replace(drafts=drafts)
        # Which of the tokens that it samples is the last, the device can't tell.
        open_step.decode_jobs[index].sampled_by = -1

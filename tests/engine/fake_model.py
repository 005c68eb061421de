"""A model of a few lines that reads its past through simulated KV blocks, for tests of the scheduler.

What it computes at a position depends on everything in the slots before it, so a block that is
shared wrongly, overwritten or freed too early changes an answer.
"""

from __future__ import annotations

import zlib
from collections import defaultdict, deque

from turbolm.engine.scheduler import Scheduler
from turbolm.engine.step import StepResult
from turbolm.types import Output, Request, SamplingParams, TokenLogprob, Usage

VOCABULARY = 12
EOS = 7
STOP = 8


def namespace(request):
    return zlib.crc32(repr((request.tenant, request.loaded_adapter)).encode())


def state_of(request, past, token):
    """What the model keeps for `token`, given the states that it reads before it."""
    return hash((namespace(request), len(past), sum(past), token))


def next_tokens(request, states, count):
    """The model's next `count` tokens, greedily, after tokens with these states."""
    states, tokens = list(states), []
    for _ in range(count):
        tokens.append(states[-1] % VOCABULARY)
        states.append(state_of(request, states, tokens[-1]))
    return tuple(tokens)


def alone(request, max_context):
    """The one right last output: what `request` yields without scheduler, blocks and company."""
    params = request.params
    tokens, answer, states = list(request.prompt_token_ids), [], []
    for token in tokens:
        states.append(state_of(request, states, token))
    reason, stop = ("length" if params.max_tokens == 0 else None), None
    while reason is None:
        token = states[-1] % VOCABULARY
        can_stop = len(answer) >= params.min_tokens
        answer.append(token)
        states.append(state_of(request, states, token))
        is_eos = token in request.eos_token_ids and not params.ignore_eos
        if can_stop and (is_eos or token in params.stop_token_ids):
            reason, stop = "stop", token
        elif len(answer) == params.max_tokens or len(tokens) + len(answer) == max_context:
            reason = "length"
    shown = answer[:-1] if stop is not None and not params.include_stop else answer
    return tuple(shown), reason, stop, len(answer)


class Oracle:
    """A drafter that knows what the model says to requests of no tenant and no adapter, and lies at times."""

    def __init__(self, token_ids, random, lies=0.3):
        self.token_ids, self.random, self.lies = token_ids, random, lies

    def propose(self, limit, num_decodes):
        request, states = request_of(), []
        for token in self.token_ids:
            states.append(state_of(request, states, token))
        drafts = next_tokens(request, states, self.random.randint(0, limit))
        return tuple((t + 1) % VOCABULARY if self.random.random() < self.lies else t for t in drafts)

    def promises(self, num_decodes):
        return len(self.token_ids) % 2 == 0


class Model:
    """A device that runs steps in order: writes a state per new token to its slot, reads those before it.

    It sees of a step what was there when it was submitted, and computes it as late as it may."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.slots = {}
        self.sequences = []
        self.deltas = defaultdict(list)  # (id, index) → outputs of `step`
        self.num_computed = 0
        self.flights = deque()  # (step, pending) of `start`
        self.queue = deque()  # submitted, not computed
        self.sampled = {}  # by the last step computed: sequence → token

    def add(self, request, **options):
        sequence = self.scheduler.add(request, **options)
        self.sequences.append(sequence)
        return sequence

    def warm_up(self):
        return False

    def close(self):
        pass

    def submit(self, step):
        pending = Pending(self, step)
        self.queue.append(pending)
        return pending

    def run(self, step):
        return self.submit(step).results()

    def compute_until(self, pending):
        while pending in self.queue:
            self.queue.popleft().compute()

    def slot(self, blocks, position):
        size = self.scheduler.block_size
        return blocks[position // size] * size + position % size

    def write(self, item, blocks, token_ids):
        sequence, size = item.sequence, self.scheduler.block_size
        end = item.start + item.num_tokens
        written = blocks[item.start // size : -(-end // size)]
        for other in self.sequences:
            assert other is sequence or not set(written) & set(other.blocks), "writes to a block of somebody else"
        for position in range(item.start, end):
            past = [self.slots.get(self.slot(blocks, earlier), 0) for earlier in range(position)]
            self.slots[self.slot(blocks, position)] = state_of(sequence.request, past, token_ids[position])
        self.num_computed += item.num_tokens

    def read(self, item, blocks, token_ids):
        sequence, request = item.sequence, item.sequence.request
        if sequence.finish_reason:  # nobody wants this any more, and an earlier step of its may have broken
            return StepResult((0,) if item.samples else ())
        states = [self.slots[self.slot(blocks, position)] for position in range(item.start + item.num_tokens)]
        expected = []
        for token in token_ids[: len(states)]:
            expected.append(state_of(request, expected, token))
        assert states == expected, "K/V of other tokens"
        chosen = [state % VOCABULARY for state in states[item.start + item.num_new_tokens - 1 :]]
        count = next((i for i, draft in enumerate(item.drafts) if draft != chosen[i]), len(item.drafts)) + 1
        tokens = tuple(chosen[:count]) if item.samples else ()
        return StepResult(tokens, self.logprobs(request, tokens), self.prompt_logprobs(item))

    def logprobs(self, request, tokens):
        return tuple(TokenLogprob(token, -1.0, 1) for token in tokens if request.params.logprobs is not None)

    def prompt_logprobs(self, item):
        request = item.sequence.request
        if request.params.prompt_logprobs is None:
            return ()
        first, last = item.start + 1, min(item.start + item.num_new_tokens + 1, item.sequence.num_prompt)
        entries = [TokenLogprob(request.prompt_token_ids[position], -1.0, 1) for position in range(first, last)]
        return tuple(entries) if item.start else (None, *entries)

    def step(self):
        """One whole step; its step and outputs."""
        step = self.start()
        assert step is not None
        return step, self.complete()

    def start(self):
        """The next step, in flight from now on."""
        step = self.scheduler.next_batch()
        if step is not None:
            self.flights.append((step, self.submit(step)))
        return step

    def complete(self):
        """The oldest step's outputs."""
        step, pending = self.flights.popleft()
        return self.note(self.scheduler.update(step, pending.results()))

    def note(self, outputs):
        for output in outputs:
            self.deltas[output.request_id, output.index].append(output)
        return outputs

    def finish(self, max_steps=1000, depth=1):
        """Steps until all is done, so many in flight; all outputs so far, collected by (id, index)."""
        for _ in range(max_steps):
            while len(self.flights) < depth and self.start():
                pass
            if not self.flights:
                assert not self.scheduler.has_work
                return {key: Output.collect(items) for key, items in self.deltas.items()}
            self.complete()
        raise AssertionError(f"unfinished after {max_steps} steps")


class Pending:
    """A step on the device."""

    def __init__(self, model, step):
        self.model = model
        self.step = step
        self.seen = [(list(item.sequence.blocks), list(item.sequence.token_ids)) for item in step.items]
        self.computed = None

    def results(self):
        self.model.compute_until(self)
        return self.computed

    def lose(self):
        """Breaks: nothing comes of it, if it isn't computed yet."""
        if self in self.model.queue:
            self.model.queue.remove(self)
            self.model.sampled = {}

    def compute(self):
        model, parts = self.model, []
        for item, (blocks, token_ids) in zip(self.step.items, self.seen, strict=True):
            if item.follows:
                assert len(token_ids) == item.start
                assert item.sequence in model.sampled or item.sequence.finish_reason == "error"
                token_ids.append(model.sampled.get(item.sequence, 0))
            parts.append((item, blocks, [*token_ids, *item.drafts]))
        for part in parts:
            model.write(*part)
        self.computed = [model.read(*part) for part in parts]
        samples = zip(self.step.items, self.computed, strict=True)
        model.sampled = {item.sequence: result.token_ids[-1] for item, result in samples if item.samples}


def scheduler_of(**options):
    defaults = {
        "num_blocks": 64,
        "block_size": 4,
        "max_batch_size": 8,
        "max_batch_tokens": 32,
        "max_context": 128,
        "max_waiting": 100,
    }
    return Scheduler(**(defaults | options))


def request_of(name="a", prompt=(1, 2, 3), max_tokens=4, ignore_eos=True, eos=(EOS,), params=None, **options):
    params = params or {}
    return Request(
        name,
        tuple(prompt),
        SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, **params),
        eos_token_ids=eos,
        **options,
    )


def assert_right(output, request, max_context=128):
    shown, reason, stop, num_tokens = alone(request, max_context)
    assert (output.token_ids, output.finish_reason, output.stop) == (shown, reason, stop)
    assert output.usage == Usage(len(request.prompt_token_ids), num_tokens, output.usage.cached_tokens)


def parts(step):
    return [(item.sequence.request.id, item.start, item.num_new_tokens, item.samples) for item in step.items]

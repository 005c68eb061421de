"""Each request gets one last output, however often the process dies."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from turbolm.errors import EngineError, RequestError
from turbolm.types import Request, Usage
from turbolm.worker.ledger import Ledger


def requests(*names: str) -> list[Request]:
    return [Request(name, (1, 2, 3)) for name in names]


def numbers(entries) -> dict[str, int]:
    return {entry.request.id: entry.number for entry in entries}


def ending(number: int, reason: str = "length") -> tuple:
    return (number, (5,), (), (), reason, None, (3, 1, 0), None, None)


def test_outputs_are_those_of_the_request():
    ledger = Ledger()
    ledger.add(requests("a", "b"), deltas=True)
    given = numbers(ledger.hand_out())
    assert ledger.hand_out() == []
    first, second = ledger.take([given["a"], given["b"]], [10, 20], [])
    assert (first.request_id, first.token_ids, second.request_id, second.token_ids) == ("a", (10,), "b", (20,))
    (last,) = ledger.take([], [], [ending(given["a"])])
    assert (last.request_id, last.finish_reason, last.usage) == ("a", "length", Usage(3, 1))
    assert ledger.take([given["a"]], [11], [ending(given["a"])]) == []
    assert ledger.num_open == 1


def test_an_id_in_use_is_refused_and_nothing_is_added():
    ledger = Ledger()
    ledger.add(requests("a"), deltas=True)
    with pytest.raises(RequestError, match=r"'a'.*another id"):
        ledger.add(requests("b", "a"), deltas=True)
    with pytest.raises(RequestError):
        ledger.add(requests("c", "c"), deltas=True)
    assert ledger.num_open == 1


def test_after_a_crash_what_was_sent_ends_and_the_rest_goes_on():
    ledger = Ledger()
    ledger.add(requests("sent", "waiting", "gone"), deltas=True)
    given = numbers(ledger.hand_out())
    ledger.begin([given["sent"]])
    ledger.take([given["sent"]], [9], [])
    assert ledger.cancel("gone", 0) == (True, [])
    ended = {output.request_id: output for output in ledger.crash("was killed by SIGKILL")}
    assert ended.keys() == {"sent", "gone"}
    assert "SIGKILL in the middle" in str(ended["sent"].error)
    assert ended["sent"].usage == Usage(3, 1)
    assert (ended["gone"].finish_reason, ended["gone"].error) == ("cancelled", None)
    assert numbers(ledger.hand_out()).keys() == {"waiting"}


def test_what_only_waited_is_not_blamed():
    ledger = Ledger()
    ledger.add(requests("waiting"), deltas=True)
    for _ in range(10):
        assert len(ledger.hand_out()) == 1
        assert ledger.crash("died") == []


def test_suspects_are_tried_one_at_a_time_and_the_second_crash_is_the_last():
    ledger = Ledger()
    ledger.add(requests("killer", "one", "two"), deltas=False)
    ledger.begin(numbers(ledger.hand_out()).values())
    assert ledger.crash("died") == []
    ledger.add(requests("new"), deltas=True)
    given = numbers(ledger.hand_out())
    assert given.keys() == {"killer", "new"}
    ledger.begin(given.values())
    (blamed,) = ledger.crash("died again")
    assert blamed.request_id == "killer"
    assert isinstance(blamed.error, EngineError)
    assert all(word in str(blamed.error) for word in ("2 times", "'killer'", "died again"))
    order = []
    while ledger.has_suspects:
        (entry,) = ledger.hand_out()
        assert ledger.hand_out() == []
        order.append(entry.request.id)
        ledger.begin([entry.number])
        assert bool(ledger.take([entry.number], [4], [])) == (entry.request.id == "new")
        if entry.request.id == "one":
            assert ledger.crash("died") == []  # nothing was handed out, and it did no harm
            (entry,) = ledger.hand_out()
            ledger.take([entry.number], [6], [])
            (output,) = ledger.take([], [], [ending(entry.number)])
            assert output.token_ids == (6, 5)
    assert order == ["one", "two", "new"]
    assert ledger.num_open == 2


def test_a_cancelled_suspect_makes_way():
    ledger = Ledger()
    ledger.add(requests("one", "two"), deltas=True)
    ledger.begin(numbers(ledger.hand_out()).values())
    ledger.crash("died")
    (entry,) = ledger.hand_out()
    assert ledger.cancel("two", 0)[1][0].finish_reason == "cancelled"
    assert ledger.cancel("one", 0) == (True, [])
    (output,) = ledger.take([], [], [ending(entry.number, "cancelled")])
    assert (output.request_id, ledger.has_work) == ("one", False)
    assert ledger.cancel("one", 0) == (False, [])


class LedgerMachine(RuleBasedStateMachine):
    """Any order of events, against a plain account of them."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.count = 0
        self.open: dict[str, int] = {}  # → crashes at work before any output
        self.with_child: dict[str, int] = {}  # → number
        self.at_work: set[str] = set()
        self.spoken: set[str] = set()  # have handed something out
        self.cancelled: set[str] = set()

    def note(self, outputs) -> None:
        for output in outputs:
            assert output.request_id in self.open, "after its end"
            if output.finish_reason is not None:
                for known in (self.open, self.with_child):
                    known.pop(output.request_id, None)

    @rule()
    def add(self):
        self.ledger.add(requests(f"r{self.count}"), deltas=True)
        self.open[f"r{self.count}"] = 0
        self.count += 1

    @rule()
    def hand_out(self):
        for name, number in numbers(self.ledger.hand_out()).items():
            assert name not in self.with_child, "handed out twice"
            self.with_child[name] = number

    @precondition(lambda self: self.with_child)
    @rule(data=st.data())
    def begin(self, data):
        name = data.draw(st.sampled_from(sorted(self.with_child)))
        self.ledger.begin([self.with_child[name]])
        self.at_work.add(name)

    @precondition(lambda self: self.at_work & self.with_child.keys())
    @rule(data=st.data(), ends=st.booleans())
    def step(self, data, ends):
        name = data.draw(st.sampled_from(sorted(self.at_work & self.with_child.keys())))
        number = self.with_child[name]
        self.spoken.add(name)
        outputs = self.ledger.take([], [], [ending(number)]) if ends else self.ledger.take([number], [1], [])
        assert [output.request_id for output in outputs] == [name]
        self.note(outputs)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data):
        name = data.draw(st.sampled_from(sorted(self.open)))
        is_there, outputs = self.ledger.cancel(name, 0)
        assert is_there == (name in self.with_child)
        assert len(outputs) == (not is_there)
        self.cancelled.add(name)
        self.note(outputs)

    @rule()
    def crash(self):
        expected = {name for name in self.open if name in self.spoken}
        expected |= self.cancelled & self.open.keys()
        for name in self.at_work & self.with_child.keys():
            self.open[name] += 1
        expected |= {name for name, crashes in self.open.items() if crashes >= 2}
        outputs = self.ledger.crash("died")
        assert {output.request_id for output in outputs} == expected
        self.note(outputs)
        self.with_child.clear()
        self.at_work.clear()

    @invariant()
    def owes_exactly_the_open_ones(self):
        assert self.ledger.num_open == len(self.open)

    def teardown(self):
        self.note(self.ledger.fail(EngineError("closed")))
        assert not self.open
        assert not self.ledger.has_work


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

"""What passes between a front end and its engine's process arrives as it was."""

from __future__ import annotations

import dataclasses
import math
import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolm import errors
from turbolm.config import EngineConfig, ResolvedConfig
from turbolm.engine.step import SchedulerStats
from turbolm.errors import ContextOverflowError, EngineError, RequestError, TurbolmError
from turbolm.kv import KvFormat
from turbolm.types import Output, Request, SamplingParams, TokenLogprob, Usage
from turbolm.worker import wire
from turbolm.worker.wire import Channel

TOKENS = st.lists(st.integers(0, 1 << 20), max_size=5).map(tuple)
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(1, 1 << 31),
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 1 << 31),
    seed=st.none() | st.integers(-(1 << 63), (1 << 64) - 1),
    logit_bias=st.dictionaries(st.integers(0, 1 << 20), st.floats(-100, 100), max_size=3),
    stop=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=3),
    stop_token_ids=TOKENS,
    ignore_eos=st.booleans(),
    bad_words=st.just(("x",)),
    logprobs=st.none() | st.integers(0, 20),
)
REQUESTS = st.builds(
    Request,
    id=st.text("0123456789abcdef", min_size=1),
    prompt_token_ids=TOKENS.filter(bool),
    params=PARAMS,
    index=st.integers(0, 255),
    priority=st.integers(-5, 5),
    tenant=st.text(st.characters(exclude_categories=["Cs"])),
    adapter=st.none() | st.just("a"),
    eos_token_ids=TOKENS,
    bad_words_ids=st.lists(TOKENS, max_size=2).map(tuple),
)
LOGPROBS = st.builds(
    TokenLogprob,
    token_id=st.integers(0, 1 << 20),
    logprob=st.floats(max_value=0) | st.just(-math.inf),
    rank=st.integers(1, 9),
    top=st.lists(st.tuples(st.integers(0, 9), st.floats(-5, 0)), max_size=2).map(tuple),
)
ERRORS = st.sampled_from([EngineError("dead"), RequestError("bad", "prompt"), ContextOverflowError("long")])


def through(*message: object) -> tuple:
    """A message as the other side gets it."""
    ours, theirs = (Channel(end) for end in socket.socketpair())
    ours.send(*message)
    (found,) = theirs.receive(5)
    ours.close()
    theirs.close()
    return found


@settings(max_examples=60, deadline=None)
@given(REQUESTS)
def test_requests_arrive_as_they_were(request_):
    (packed,) = through(wire.pack_request(request_))
    assert wire.unpack_request(packed) == request_


def test_every_field_of_a_request_can_be_sent():
    """A new field that is no plain value needs a way through: this is where it shows."""
    plain = (str, int, float, bool, type(None), tuple, dict)
    for record in (SamplingParams(), Request("r", (1,))):
        for field in dataclasses.fields(record):
            assert isinstance(getattr(record, field.name), (*plain, SamplingParams)), field.name


@settings(max_examples=60, deadline=None)
@given(TOKENS, st.lists(LOGPROBS, max_size=2), st.booleans(), st.none() | ERRORS)
def test_outputs_arrive_as_they_were(tokens, logprobs, is_final, error):
    request = Request("r", (1, 2))
    prompt_logprobs = (None, *logprobs)
    ending = ("stop", 7, Usage(2, 3, 1), error) if is_final else (None, None, None, None)
    output = Output("r", 0, tokens, (), tuple(logprobs), prompt_logprobs, *ending)
    numbers = {("r", 0): 5}
    short, short_tokens, rows = through(*wire.pack_outputs([output], numbers))
    assert (short, short_tokens) == ((), ())
    assert rows[0][0] == 5
    found = wire.unpack_output(request, rows[0])
    assert found._replace(error=None) == output._replace(error=None)
    assert repr(found.error) == repr(error if is_final else None)
    assert bool(numbers) != is_final


def test_a_step_of_single_tokens_is_two_lists():
    outputs = [Output(f"r{i}", 0, (i * 100,)) for i in range(50)]
    numbers = {(f"r{i}", 0): i for i in range(50)}
    assert wire.pack_outputs(outputs, numbers) == (list(range(50)), [i * 100 for i in range(50)], [])


@pytest.mark.parametrize("name", [name for name in vars(errors) if name.endswith("Error")])
def test_every_kind_of_error_arrives_as_itself(name):
    kind = getattr(errors, name)
    error = kind("text", "field") if issubclass(kind, RequestError) else kind("text")
    found = wire.unpack_error(*through(wire.pack_error(error)))
    assert (type(found), str(found)) == (kind, "text")
    assert getattr(found, "parameter", None) == getattr(error, "parameter", None)


def test_errors_of_other_rooms_arrive_as_their_kind():
    class Odd(errors.CapacityError):
        pass

    assert type(wire.unpack_error(wire.pack_error(Odd("text")))) is errors.CapacityError
    assert type(wire.unpack_error(("NoSuchError", "text", None))) is EngineError
    assert isinstance(wire.unpack_error(("subprocess", "text", None)), TurbolmError)


def test_configurations_and_stats_arrive_with_the_records_in_them():
    fields = {field.name: 1 for field in dataclasses.fields(ResolvedConfig)}
    config = ResolvedConfig(**fields | {"kv": KvFormat("int8", "int4", "float16", (0, 3)), "reasons": ("a", "b")})
    assert wire.unpack_record(ResolvedConfig, *through(wire.pack_record(config))) == config
    settings_ = EngineConfig(max_context=100, kv_memory="1G")
    assert wire.unpack_record(EngineConfig, *through(wire.pack_record(settings_))) == settings_
    stats = SchedulerStats(*range(len(dataclasses.fields(SchedulerStats))))
    assert wire.unpack_stats(*through(wire.pack_stats(stats))) == stats


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=8), st.integers(1, 11))
def test_messages_survive_any_cut(messages, size):
    """The bytes may arrive in pieces of any size."""
    source, sink = socket.socketpair()
    sender, (left, right) = Channel(source), socket.socketpair()
    receiver = Channel(right)
    for message in messages:
        sender.send("m", message)
    sender.close()
    found = []
    while piece := sink.recv(size):
        left.sendall(piece)
        found += receiver.receive(5)
    assert found == [("m", message) for message in messages]
    left.close()
    with pytest.raises(EOFError):
        receiver.receive(5)
    receiver.close()
    sink.close()


def test_sending_never_blocks_and_everything_arrives_in_order():
    left, right = (Channel(end) for end in socket.socketpair())
    started = time.monotonic()
    for number in range(40):
        left.send("data", number, bytes(1 << 18))  # far beyond what a socket holds
    assert time.monotonic() - started < 2
    found = []
    while len(found) < 40:
        found += [message[1] for message in right.receive(5)]
    assert found == list(range(40))
    left.flush(5)
    left.close()
    right.close()


def test_closing_with_unsent_data_does_not_hang():
    left, right = (Channel(end) for end in socket.socketpair())
    for _ in range(20):
        left.send("data", bytes(1 << 18))
    closing = threading.Thread(target=left.close)
    closing.start()
    closing.join(5)
    assert not closing.is_alive()
    left.send("more")  # goes nowhere
    right.close()


def test_silence_and_an_end():
    left, right = (Channel(end) for end in socket.socketpair())
    assert right.receive(0.01) == []
    left.close()
    with pytest.raises(EOFError):
        right.receive(1)
    right.send("to nobody")
    right.close()


@pytest.mark.parametrize("data", [b"\xc1", b"\x01", b"\x90", b"\x92\x01"])
def test_what_is_no_message_is_said(data):
    left, right = socket.socketpair()
    channel = Channel(right)
    left.sendall(len(data).to_bytes(4, "little") + data)
    with pytest.raises(EngineError, match="don't understand"):
        channel.receive(1)
    left.close()
    channel.close()

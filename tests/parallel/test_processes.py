"""Other ranks' processes: they get what they are sent, none outlives the first, and a lost one is named."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from turbolm.errors import CheckpointError, EngineError
from turbolm.parallel import processes
from turbolm.parallel.processes import RankProcesses

ECHO, EXIT, SLEEP, IGNORE_THE_END = range(4)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tensor parallelism needs Linux")


@pytest.fixture(autouse=True)
def toy_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture
def ranks() -> Iterator[tuple[RankProcesses, list[int]]]:
    """Two processes beside this one, and their ids."""
    found = RankProcesses("toy_rank", 3)
    messages = found.receive()
    assert [message.kind for message in messages] == [1, 2]
    yield found, [int(bytes(message.body)) for message in messages]
    found.close()


def until_gone(pids: list[int]) -> None:
    def is_there(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    end = time.monotonic() + 10
    while any(map(is_there, pids)):
        assert time.monotonic() < end, "a process is left"
        time.sleep(0.02)


@pytest.mark.parametrize("sizes", [[0], [1, 70_000], [3_000_000]])
def test_messages_arrive_whole(ranks: tuple[RankProcesses, list[int]], sizes: list[int]) -> None:
    parts = [bytes(i % 251 for i in range(size)) for size in sizes]
    ranks[0].send(ECHO, parts)
    assert [bytes(message.body) for message in ranks[0].receive()] == [b"".join(parts)] * 2


def test_closing_ends_all(ranks: tuple[RankProcesses, list[int]]) -> None:
    found, pids = ranks
    found.close()
    until_gone(pids)
    found.close()
    with pytest.raises(EngineError, match="closed"):
        found.send(ECHO)


def test_one_that_ignores_the_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_END_SECONDS", 0.3)
    found = RankProcesses("toy_rank", 2)
    (message,) = found.receive()
    pid = int(bytes(message.body))
    found.send(IGNORE_THE_END)
    found.close()
    until_gone([pid])


def test_one_that_ends_is_named_and_ends_the_others(ranks: tuple[RankProcesses, list[int]]) -> None:
    found, pids = ranks
    found.send(EXIT)
    until_gone(pids)
    time.sleep(0.2)
    with pytest.raises(EngineError, match=rf"rank 1 \(process {pids[0]}\) ended with exit code 3; .*3 processes"):
        found.check()


def test_errors_of_work_together_name_who_is_lost(ranks: tuple[RankProcesses, list[int]]) -> None:
    found, pids = ranks
    with pytest.raises(EngineError, match="rank 1"), found.watching():
        psutil.Process(pids[0]).kill()
        raise RuntimeError("Connection closed by peer")
    until_gone(pids)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), EngineError("launch failed"), KeyError("x")])
def test_after_an_error_of_its_own_the_first_gives_all_up(
    ranks: tuple[RankProcesses, list[int]], error: Exception
) -> None:
    """What the others do then no longer fits what it does."""
    found, pids = ranks
    message = r"^rank 0 failed: .*(memory|launch|x).* load it again"
    with pytest.raises(EngineError, match=message) as caught, found.watching():
        raise error
    assert caught.value.__cause__ is error
    until_gone(pids)
    with pytest.raises(EngineError, match="rank 0 failed"):
        found.send(ECHO)


def test_what_a_user_did_stays_as_it_is(ranks: tuple[RankProcesses, list[int]]) -> None:
    with pytest.raises(CheckpointError, match=r"^torn$"), ranks[0].watching():
        raise CheckpointError("torn")
    ranks[0].check()


def test_one_that_takes_no_messages_is_named(ranks: tuple[RankProcesses, list[int]]) -> None:
    found, pids = ranks
    psutil.Process(pids[1]).suspend()
    found.send(ECHO, [b"x" * 1000])
    end = time.monotonic() + 5
    while found._channels[0].num_unread and time.monotonic() < end:
        time.sleep(0.02)
    with pytest.raises(EngineError, match=r"^rank 2 has not answered for 30 s"):
        found.lose_stuck()
    until_gone(pids)


def test_a_full_channel_is_an_error_in_time(ranks: tuple[RankProcesses, list[int]]) -> None:
    found, _ = ranks
    for channel in found._channels:
        channel.set_timeout(0.3)
    found.send(SLEEP)
    with pytest.raises(EngineError, match="rank 1 has taken no message"):
        for _ in range(100):
            found.send(ECHO, [b"x" * 500_000])


def test_nobody_outlives_a_killed_parent() -> None:
    script = Path(__file__).parent / "lone_parent.py"
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    until_gone(pids)


def test_a_module_that_does_not_start_is_an_error() -> None:
    found = RankProcesses("no_such_rank_module", 2)
    with pytest.raises(EngineError, match=r"rank 1 \(process \d+\) ended with exit code 1"):
        found.receive()
    found.close()

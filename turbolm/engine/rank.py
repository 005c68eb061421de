"""The process of one rank but the first: `python -m turbolm.engine.rank DESCRIPTOR RANK`, started by the one that
leads. It loads its part of the model, and then computes each step that it is told of, and takes the adapters that come
between them, until it is left alone."""

from __future__ import annotations

import os
import sys
import traceback

from turbolm.engine.build import build_part
from turbolm.engine.part import device_of
from turbolm.engine.rank_adapters import ReceivedAdapters
from turbolm.engine.ranks import (
    ADAPTER_MODULE,
    ADAPTER_PLACE,
    FAILED,
    LOADED,
    STARTED,
    STEP,
    WARM_UP,
    LoadOrder,
    StepOrder,
)
from turbolm.engine.step_device import StepDevice
from turbolm.errors import TurbolmError
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.registry import decoder_spec
from turbolm.parallel.channel import Channel, inherited
from turbolm.parallel.collectives import ProcessGroup
from turbolm.parallel.processes import end_with_parent
from turbolm.parallel.shard import Shard


def load(channel: Channel, rank: int) -> tuple[StepDevice, ReceivedAdapters] | None:
    """Ready to compute; None where the leading process went away."""
    message = channel.receive()
    if message is None:
        return None
    order = LoadOrder.decode(bytes(message.body))
    channel.send(STARTED)
    config = order.config
    group = ProcessGroup(Shard(rank, config.tensor_parallel), device_of(config, rank), order.store)
    checkpoint = open_checkpoint(order.path)
    part = build_part(checkpoint, decoder_spec(checkpoint.config), config, order.vocab_size, group)
    channel.send(LOADED)
    return part.step_device(), ReceivedAdapters(part.adapted)


def follow(channel: Channel, device: StepDevice, adapters: ReceivedAdapters) -> None:
    """Does what it is told, until there is nobody to tell it."""
    while (message := channel.receive()) is not None:
        if message.kind == STEP:
            device.compute(*StepOrder.decode(message.body))
        elif message.kind == WARM_UP:
            device.warm_up()
        elif message.kind == ADAPTER_MODULE:
            adapters.take(message.body)
        else:
            assert message.kind == ADAPTER_PLACE
            adapters.put(message.body)


def main(descriptor: int, rank: int) -> int:
    end_with_parent()
    channel = inherited(descriptor)
    try:
        loaded = load(channel, rank)
    except TurbolmError as error:
        channel.send(FAILED, [str(error).encode()])
        return 1
    if loaded is not None:
        follow(channel, *loaded)
    return 0


if __name__ == "__main__":
    code = 1
    try:
        code = main(int(sys.argv[1]), int(sys.argv[2]))
    except BaseException:  # noqa: BLE001 (this process's own boundary)
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)  # at an ordinary end libraries would wait for ranks that may be gone

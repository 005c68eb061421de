"""What a rank's process does in tests: says its number, then does what the messages' kinds say."""

from __future__ import annotations

import os
import sys
import time

from turbolm.parallel.channel import inherited
from turbolm.parallel.processes import end_with_parent

ECHO, EXIT, SLEEP, IGNORE_THE_END = range(4)

if __name__ == "__main__":
    end_with_parent()
    channel, rank = inherited(int(sys.argv[1])), int(sys.argv[2])
    channel.send(rank, [str(os.getpid()).encode()])
    while (message := channel.receive()) is not None:
        if message.kind == ECHO:
            channel.send(rank, [bytes(message.body)])
        elif message.kind == EXIT and rank == 1:
            sys.exit(3)
        elif message.kind == SLEEP:
            time.sleep(100)
        else:
            while True:
                time.sleep(1)

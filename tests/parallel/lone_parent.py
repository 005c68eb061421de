"""A process that starts a rank's process from a thread that ends, says both numbers, and waits to be killed."""

from __future__ import annotations

import os
import threading
import time

from turbolm.parallel.processes import RankProcesses

started = []
thread = threading.Thread(target=lambda: started.append(RankProcesses("toy_rank", 2)))
thread.start()
thread.join()
time.sleep(0.3)  # the child would be gone by now if it belonged to the thread
pid = bytes(started[0].receive()[0].body).decode()
started[0].send(0, [b"still there"])
assert bytes(started[0].receive()[0].body) == b"still there"
print(os.getpid(), pid, flush=True)
started[0].send(3)
time.sleep(100)

"""`python -m turbolm.worker FD`: an engine for the process at the other end of this file descriptor."""

from __future__ import annotations

import sys

from turbolm.loading import load_model
from turbolm.worker.process import main

if __name__ == "__main__":
    main(load_model, sys.argv[1:])

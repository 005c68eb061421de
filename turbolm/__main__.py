"""`python -m turbolm`: the command line."""

from __future__ import annotations

import sys

from turbolm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

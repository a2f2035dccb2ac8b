"""`python -m openglm` is the command `openglm`."""

from __future__ import annotations

import sys

from openglm.cli import main

if __name__ == "__main__":
    sys.exit(main())

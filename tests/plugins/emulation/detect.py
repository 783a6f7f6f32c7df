"""Run the small cases on one library: `python -m tests.plugins.emulation.detect LIBRARY`; exit 1: one failed."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.plugins.emulation.cases import check_everything_small
from tests.plugins.emulation.harness import Kernels


def main() -> int:
    try:
        check_everything_small(Kernels(Path(sys.argv[1])))
    except AssertionError as error:
        sys.stdout.write(str(error).partition("\n")[0] + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

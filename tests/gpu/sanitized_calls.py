"""The calls that compute-sanitizer watches: `compute-sanitizer python -m tests.gpu.sanitized_calls LIBRARY`."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.gpu.boundary import open_boundary
from tests.gpu.checks import check_some_of_everything
from tests.gpu.driver import CudaMemory, Driver

if __name__ == "__main__":
    check_some_of_everything(Driver(open_boundary(Path(sys.argv[1])), CudaMemory()))

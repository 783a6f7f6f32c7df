"""`python -m fptq_export`."""

import sys

from fptq_export.cli import main

sys.exit(main())

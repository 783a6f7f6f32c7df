"""`python -m fptq_export.roofline [FILE]`: write the table of modelled times."""

from __future__ import annotations

import sys
from pathlib import Path

from fptq_export.files import write_text
from fptq_export.roofline.table import TABLE_FILE, markdown

if __name__ == "__main__":
    write_text(markdown(), Path(sys.argv[1]) if len(sys.argv) > 1 else TABLE_FILE)

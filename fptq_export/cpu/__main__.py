"""`python -m fptq_export.cpu build` compiles the C++ part; `info` says what this machine runs."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from fptq_export.cpu.build import build_extension
from fptq_export.cpu.extension import BUILD_COMMAND
from fptq_export.cpu.instruction_set import available_instruction_sets
from fptq_export.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code is 1 for what the user can mend."""
    parser = argparse.ArgumentParser(prog=BUILD_COMMAND.rpartition(" ")[0], description=__doc__)
    parser.add_argument("command", choices=["build", "info"], help="build: compile; info: list instruction sets")
    command = parser.parse_args(arguments).command
    try:
        if command == "build":
            Console().print(f"built {build_extension()}", soft_wrap=True, highlight=False)
        names = ", ".join(item.value for item in available_instruction_sets())
        Console().print(f"instruction sets of this machine: {names}", soft_wrap=True, highlight=False)
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", soft_wrap=True, highlight=False, markup=False)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())

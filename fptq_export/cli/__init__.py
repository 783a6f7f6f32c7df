"""The `fptq-export` command."""

from fptq_export.cli.main import main

__all__ = ["main"]

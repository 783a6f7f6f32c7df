"""`python -m fptq_export.plugin`: build the plugin libraries, say what is in them, or where the headers are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fptq_export.errors import ExitCode, UserError
from fptq_export.plugin.build import ARCHITECTURES, PluginBuild, build_plugin
from fptq_export.plugin.library import BUILD_DIR, plugin_info
from fptq_export.plugin.tools import header_directories

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    try:
        if options.verb == "headers":
            for directory in header_directories(BUILD_DIR.parent / "tensorrt-include"):
                console.print(str(directory), markup=False, soft_wrap=True)
            return ExitCode.OK
        if options.verb == "build":
            with console.status("building the plugin: some minutes for all architectures"):
                library = build_plugin(
                    PluginBuild(
                        architectures=tuple(options.arch),
                        tensorrt_include=options.tensorrt_include,
                        directory=options.directory.absolute(),
                        jobs=options.jobs,
                    )
                )
            info = plugin_info(library)
        else:
            info = plugin_info()
    except UserError as error:
        Console(stderr=True, highlight=False).print(str(error), markup=False)
        return ExitCode.USER_ERROR
    console.print(info.model_dump_json(indent=2), markup=False)
    return ExitCode.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fptq_export.plugin", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("info", help="print version, architectures and layout of the libraries")
    verbs.add_parser("headers", help="print where the headers of TensorRT, CUDA and nlohmann-json are, for other C++")
    build = verbs.add_parser("build", help="build the libraries with CMake, Ninja and nvcc")
    build.add_argument(
        "--arch", nargs="+", default=ARCHITECTURES, metavar="CC", help=f"subset of {' '.join(ARCHITECTURES)} [all]"
    )
    build.add_argument("--tensorrt-include", type=Path, metavar="DIR", help="TensorRT's headers [found or downloaded]")
    build.add_argument("--directory", type=Path, default=BUILD_DIR, metavar="DIR", help="where to build [build/plugin]")
    build.add_argument("--jobs", type=int, metavar="N", help="compilers at a time [as Ninja chooses]")
    return parser


if __name__ == "__main__":
    sys.exit(main())

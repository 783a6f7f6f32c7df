"""The `fptq-export` command: parse, run, print; errors of the user become one message and an exit code."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from fptq_export.cli.arguments import RUN_VERB, TOOLS, options_from_namespace, parser_for_cli, verb_and_arguments
from fptq_export.cli.launch import connected, is_first
from fptq_export.cli.option_names import canonical_arguments
from fptq_export.errors import AnotherRankError, ExitCode, FptqError, UserError
from fptq_export.files import user_error_from_os_error
from fptq_export.verify.report import ratio_from_option

if TYPE_CHECKING:
    from calib.ranks import Ranks
    from fptq_export.progress import Progress

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command line without the program's name; `sys.argv[1:]` when None.

    Returns:
        The exit code (`errors.ExitCode`).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(stderr=True, highlight=False)
    verbose = "-v" in words or "--verbose" in words
    try:
        with connected() as ranks:
            if ranks.rank == 0:
                return _run(words, console, verbose, ranks)
            _serve(ranks, verbose)
    except AnotherRankError as error:
        return error.exit_code
    except FptqError as error:
        return _report(error, console, verbose)
    except OSError as error:
        mendable = user_error_from_os_error(error)
        if mendable is None:
            raise
        return _report(mendable, console, verbose)
    except KeyboardInterrupt:
        if is_first():
            console.print("interrupted; run the same command again to go on", style="yellow")
        return ExitCode.INTERRUPTED
    except Exception:  # noqa: BLE001 - the outermost frame: whatever is left is a bug, shown with its traceback
        console.print(traceback.format_exc(), markup=False)
        console.print("this is a bug of fptq-export: please report it with the lines above", style="red")
        return ExitCode.BUG
    return ExitCode.OK


def _run(words: list[str], console: Console, verbose: bool, ranks: Ranks) -> ExitCode:
    parser = parser_for_cli()
    if not words or words[0] in ("-h", "--help", "--version"):
        parser.parse_args(words or ["--help"])
    verb, rest = verb_and_arguments(words)
    given = vars(parser.parse_args([verb, *canonical_arguments(rest, _known_options(parser, verb))]))
    if "max_ppl_increase" in given:
        given["max_ppl_increase"] = ratio_from_option(given["max_ppl_increase"])
    command = shlex.join(["fptq-export", *words])
    if not verbose:
        _silence_libraries()
    if verb in TOOLS:
        if ranks.size > 1:
            raise UserError(verb, f"runs in one process, not in {ranks.size}", "start it without torchrun")
        return TOOLS[verb].run(given, command, console)
    options = options_from_namespace(verb, given)
    if given.get("dry_run"):
        from fptq_export.pipeline.dry_run import print_plans

        print_plans(verb, options, Console(highlight=False))
        return ExitCode.OK
    # The pipeline imports ONNX Runtime; help and usage errors do without.
    from fptq_export.pipeline.halves import runs_from_options
    from fptq_export.pipeline.road import run_road
    from fptq_export.pipeline.summary import print_summary
    from fptq_export.progress import ConsoleProgress

    if given.get("report"):
        from fptq_export.report.run import check_libraries

        check_libraries()  # before the long work, not after it
    progress, plain = ConsoleProgress(console), Console(highlight=False)
    for run in runs_from_options(verb, options, progress, ranks):
        print_summary(run_road(verb, run, command, console, progress, ranks), plain)
    if verb == RUN_VERB:
        _end_with_report(options.output, bool(given.get("report")), plain, progress)
    return ExitCode.OK


def _end_with_report(directory: Path, wanted: bool, console: Console, progress: Progress) -> None:
    """Write the report of a run that asked for one; else say how to get it."""
    if not wanted:
        console.print(f"report: {shlex.join(['fptq-export', 'report', str(directory)])}", markup=False, soft_wrap=True)
        return
    from fptq_export.report.run import run_report

    for files in run_report(directory, None, None, progress):
        console.print(f"report: {files.html}", markup=False, soft_wrap=True)


def _serve(ranks: Ranks, verbose: bool) -> None:
    """Work for the first process of a launch, which alone reads the command line."""
    if not verbose:
        _silence_libraries()
    from fptq_export.pipeline.ranks import serve

    serve(ranks)


def _known_options(parser: object, verb: str) -> list[str]:
    """Long options of a verb's parser."""
    verbs = next(action for action in parser._actions if action.dest == "verb")  # type: ignore[attr-defined]
    return [option for option in verbs.choices[verb]._option_string_actions if option.startswith("--")]


def _silence_libraries() -> None:
    """Hide notes of libraries that name nothing the user could change; `-v` shows them."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _report(error: FptqError, console: Console, verbose: bool) -> int:
    if verbose:
        console.print("".join(traceback.format_exception(error)), markup=False)
    label = "error" if isinstance(error, UserError) else type(error).__name__
    console.print(Text.assemble((f"{label}: ", "bold red"), str(error)), soft_wrap=True)
    return error.exit_code

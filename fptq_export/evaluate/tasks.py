"""Tasks of lm-evaluation-harness: found and loaded before any model, run on one model after the other."""

from __future__ import annotations

import difflib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partialmethod
from numbers import Real
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import jinja2
import tqdm
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from fptq_export.errors import UserError
from fptq_export.evaluate.language_model import HarnessModel, refuse_sampling
from fptq_export.evaluate.options import EvalOptions, System
from fptq_export.evaluate.report import MetricFigures, MetricResult, TaskResult

__all__ = ["LoadedTasks", "load_tasks", "merged_results"]

BOOTSTRAP_DRAWS = 1000
"""Draws behind the standard error of metrics without a closed form; lm-eval's default is a hundred times as many."""

_DATA_ERRORS = (OSError, datasets.exceptions.DatasetsError)
"""Not reachable, not found, not readable: a ConnectionError is an OSError too."""
_TASK_ERRORS = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    AssertionError,
    jinja2.TemplateError,
)
"""What lm-eval raises for a task file that it cannot use; the errors have no common base."""


class LoadedTasks:
    """Tasks with their documents.

    Args:
        tasks: lm-eval's `TaskDict`.
        options: Limit, solved examples and seed.

    Raises:
        UserError: A task cannot run here, or its requests cannot be made. lm-eval makes them again for each model.
    """

    def __init__(self, tasks: Mapping[str, Any], options: EvalOptions) -> None:
        self._tasks = tasks
        self._options = options
        for name, task in tasks["tasks"].items():
            _check_task(name, task)
            shots = task.get_config("num_fewshot")
            # A task that says 0 has its solved examples in its text; others take what the user says.
            if shots is None or (options.num_fewshot is not None and shots != 0):
                task.set_config(key="num_fewshot", value=options.num_fewshot or 0)
            task.set_fewshot_seed(options.seed)
            with _quiet_harness(), _task_errors_as_user_errors(f"--tasks {name}"):
                task.build_all_requests(limit=options.limit)

    def results(self, system: System, model: HarnessModel) -> tuple[TaskResult, ...]:
        """Run every task on a model; solved examples are drawn anew, so every model sees the same.

        Raises:
            UserError: A request does not fit the model.
        """
        for task in self._tasks["tasks"].values():
            task.set_fewshot_seed(self._options.seed)
        with _quiet_harness():
            found = evaluate(
                lm=model,
                task_dict=self._tasks,
                limit=self._options.limit,
                bootstrap_iters=BOOTSTRAP_DRAWS,
                log_samples=False,
            )
        groups = {name: figures for name, figures in found.get("groups", {}).items() if name not in found["results"]}
        rows = {**found["results"], **groups}
        results = (_task_result(name, rows[name], found, system) for name in rows)
        # A group that says nothing of how to add its tasks up has no figures of its own.
        return tuple(result for result in results if result is not None)


def load_tasks(options: EvalOptions) -> LoadedTasks:
    """Find the tasks by name and load their documents.

    Names are looked for in `task_path` first; lm-eval's own thousands of task files are read only for names that are
    not there. Paths inside task files are relative to `task_path`.

    Raises:
        UserError: A name is unknown, its data cannot be had, or the task is one that cannot run here.
    """
    manager = _manager(options)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in options.tasks:
        if name not in manager.task_index:
            raise _unknown(name, manager.all_tasks, options.task_path)
        for kind, entries in _load(manager, name, options.task_path).items():
            loaded[kind] |= entries
    return LoadedTasks(loaded, options)


def _manager(options: EvalOptions) -> Any:
    if options.task_path is not None:
        if not options.task_path.is_dir():
            raise UserError(f"--task-path {options.task_path}", "no such directory", "give the folder of task files")
        own = TaskManager(include_path=_absolute(options.task_path), include_defaults=False)
        if set(options.tasks) <= own.task_index.keys():
            return own
    return TaskManager(include_path=_absolute(options.task_path))


def _absolute(path: Path | None) -> str | None:
    """Tasks are loaded from within their directory, where a relative path would mean something else."""
    return None if path is None else str(path.resolve())


def _unknown(name: str, known: Sequence[str], task_path: Path | None) -> UserError:
    near = difflib.get_close_matches(name, known, n=3)
    place = "lm-eval" if task_path is None else f"{task_path} and lm-eval"
    hint = f"did you mean {', '.join(near)}?" if near else "see `lm-eval ls tasks`, or give --task-path DIR"
    return UserError(f"--tasks {name}", f"no task of that name in {place}, or its file is not valid YAML", hint)


def _load(manager: Any, name: str, task_path: Path | None) -> Mapping[str, Any]:
    where = f"--tasks {name}"
    try:
        with _quiet_harness(), _working_directory(task_path), _task_errors_as_user_errors(where):
            loaded: Mapping[str, Any] = manager.load([name])
    except _DATA_ERRORS as error:
        relative = "" if task_path is None else f"; paths in task files are relative to {task_path}"
        hint = f"connect to the network, or give files on this machine with --task-path{relative}"
        raise UserError(where, f"its data cannot be had ({_text(error)})", hint) from error
    return loaded


@contextmanager
def _task_errors_as_user_errors(where: str) -> Iterator[None]:
    try:
        yield
    except _TASK_ERRORS as error:
        hint = "mend the task's file; with solved examples, try fewer --num-fewshot"
        raise UserError(where, f"lm-eval cannot use it ({_text(error)})", hint) from error


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _check_task(name: str, task: Any) -> None:
    """Refuse what would fail after a model has run, or run what nobody asked for."""
    where = f"--tasks {name}"
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(where, "it runs code that the model writes", "use lm-eval itself, in a sandbox")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(where, "it needs more than text", "choose a task of text")
    if task.OUTPUT_TYPE == "generate_until":
        refuse_sampling(task.get_config("generation_kwargs") or {}, where)


def _task_result(name: str, row: Mapping[str, Any], found: Mapping[str, Any], system: System) -> TaskResult | None:
    directions = found["higher_is_better"].get(name, {})
    metrics = []
    for key, value in row.items():
        metric, comma, way = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        stderr = row.get(f"{metric}_stderr,{way}")
        figures = MetricFigures(value=float(value), stderr=float(stderr) if isinstance(stderr, Real) else None)
        metrics.append(
            MetricResult(metric=metric, filter=way, higher_is_better=directions.get(metric), figures={system: figures})
        )
    if not metrics:
        return None
    version = found["versions"].get(name)
    return TaskResult(
        task=name,
        is_group=name in found["group_subtasks"],
        version=None if version is None else str(version),
        num_fewshot=found["n-shot"].get(name),
        documents=row["sample_len"],
        metrics=tuple(metrics),
    )


def merged_results(known: Sequence[TaskResult], new: Sequence[TaskResult]) -> tuple[TaskResult, ...]:
    """Put the figures of one more system beside those of the systems before it; tasks and metrics are the same."""
    if not known:
        return tuple(new)
    return tuple(
        before.model_copy(
            update={
                "metrics": tuple(
                    a.model_copy(update={"figures": {**a.figures, **b.figures}})
                    for a, b in zip(before.metrics, after.metrics, strict=True)
                )
            }
        )
        for before, after in zip(known, new, strict=True)
    )


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """No bars and prints of lm-eval and datasets beside our own, and no processes for its bootstrap."""
    had_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    silent = patch.object(tqdm.std.tqdm, "__init__", partialmethod(tqdm.std.tqdm.__init__, disable=True))
    try:
        with silent, patch.dict(os.environ, DISABLE_MULTIPROC="1"), redirect_stdout(io.StringIO()):
            yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()


@contextmanager
def _working_directory(path: Path | None) -> Iterator[None]:
    before = Path.cwd()
    try:
        if path is not None:
            os.chdir(path)
        yield
    finally:
        os.chdir(before)

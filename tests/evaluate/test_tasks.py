"""Tasks of lm-evaluation-harness from local files: found, refused, and run with lm-eval's own results."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from fptq_export.errors import UserError
from fptq_export.evaluate import tasks
from fptq_export.evaluate.language_model import HarnessModel
from fptq_export.evaluate.options import EvalOptions
from fptq_export.evaluate.report import TaskResult
from fptq_export.evaluate.tasks import load_tasks, merged_results
from fptq_export.progress import NoProgress
from tests.evaluate.conftest import TASKS, Tiny

FLOAT32_SUM_TOLERANCE = 512 * 2.0**-24
"""Relative, of a mean negative log likelihood of some nats: HFLM's float32 sum of 512 exponentials, and its
logarithm. Perplexity is its exponential: as far off again for each nat, of which there are at most 16 a token."""
NATS = 16


@pytest.fixture(autouse=True)
def _only_local_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own thousands of task files take seconds to read."""
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))


def options(*names: str, **others: Any) -> EvalOptions:
    return EvalOptions(source="tiny", tasks=names, task_path=others.pop("task_path", TASKS), **others)


def results(tiny: Tiny, *names: str, **others: Any) -> tuple[TaskResult, ...]:
    harness = HarnessModel(tiny.model, tiny.tokenizer, 512, NoProgress())
    return load_tasks(options(*names, **others)).results("float", harness)


def values(result: TaskResult) -> dict[str, float]:
    return {metric.metric: metric.figures["float"].value for metric in result.metrics}


def test_results_are_those_of_lm_evals_own_model(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiple choice and rolling perplexity by lm-eval alone, with its HFLM: the same metrics and documents."""
    monkeypatch.chdir(TASKS)
    names = ["tiny_choice", "tiny_rolling"]
    theirs = evaluate(
        lm=HFLM(pretrained=tiny.torch_model, tokenizer=tiny.tokenizer, max_length=512, batch_size=1, device="cpu"),
        task_dict=TaskManager(include_path=str(TASKS), include_defaults=False).load(names),
        bootstrap_iters=0,
    )
    monkeypatch.undo()
    choice, rolling = load_tasks(options(*names)).results(
        "float", HarnessModel(tiny.model, tiny.tokenizer, 512, NoProgress())
    )
    assert values(choice) == {metric: theirs["results"]["tiny_choice"][f"{metric},none"] for metric in values(choice)}
    assert set(values(choice)) == {"acc", "acc_norm"}
    for metric, value in values(rolling).items():
        expected = theirs["results"]["tiny_rolling"][f"{metric},none"]
        assert value == pytest.approx(expected, rel=NATS * FLOAT32_SUM_TOLERANCE, abs=0.0), metric
    assert set(values(rolling)) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert (choice.documents, rolling.documents) == (6, 5)
    assert [metric.higher_is_better for metric in rolling.metrics] == [False, False, False]


def test_every_system_sees_the_same_solved_examples(tiny: Tiny) -> None:
    """Examples are drawn by the seed for each model again: the same model twice gives the same figures."""
    loaded = load_tasks(options("tiny_choice", "tiny_last_word", num_fewshot=3, seed=5))
    harness = HarnessModel(tiny.model, tiny.tokenizer, 512, NoProgress())
    first, again = (loaded.results("float", harness) for _ in range(2))
    assert first == again
    assert [result.num_fewshot for result in first] == [3, 3]


def test_another_seed_draws_other_examples(tiny: Tiny) -> None:
    """The comparison above can fail: another seed gives another perplexity."""
    (one,), (other,) = (results(tiny, "tiny_last_word", num_fewshot=1, seed=seed) for seed in (0, 3))
    assert values(one)["perplexity"] != values(other)["perplexity"]


def test_group_has_the_mean_of_its_tasks(tiny: Tiny) -> None:
    """A group is a row of its own, weighted by documents, beside the rows of its tasks."""
    by_name = {result.task: result for result in results(tiny, "tiny_group")}
    assert set(by_name) == {"tiny_choice", "tiny_last_word", "tiny_group"}
    group = by_name["tiny_group"]
    assert group.is_group
    assert group.documents == 11
    mean = (6 * values(by_name["tiny_choice"])["acc"] + 5 * values(by_name["tiny_last_word"])["acc"]) / 11
    assert values(group)["acc"] == mean


def test_group_without_a_sum_shows_its_tasks_alone(tiny: Tiny) -> None:
    """A group whose file does not say how its tasks add up is no row of empty figures."""
    assert [result.task for result in results(tiny, "tiny_plain_group", limit=1)] == ["tiny_choice"]


def test_limit_takes_the_first_documents(tiny: Tiny) -> None:
    """A quick look says how many documents it saw; without closed form or with one document there is no error bar."""
    (result,) = results(tiny, "tiny_choice", limit=1)
    assert result.documents == 1
    assert [metric.figures["float"].stderr for metric in result.metrics] == [None, None]


def test_generation_runs(tiny: Tiny) -> None:
    """Greedy tasks are answered; a random model matches nothing."""
    (result,) = results(tiny, "tiny_generation", limit=2)
    assert values(result) == {"exact_match": 0.0}


def test_systems_stand_side_by_side(tiny: Tiny) -> None:
    """Figures of two systems are merged metric by metric, and none is lost."""
    loaded = load_tasks(options("tiny_choice"))
    harness = HarnessModel(tiny.model, tiny.tokenizer, 512, NoProgress())
    first, second = loaded.results("float", harness), loaded.results("onnx", harness)
    (merged,) = merged_results(merged_results((), first), second)
    for metric in merged.metrics:
        assert list(metric.figures) == ["float", "onnx"]
        assert metric.figures["float"] == metric.figures["onnx"]


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("tiny_choise", "did you mean tiny_choice"),
        ("tiny_unreachable", "its data cannot be had .*nobody/no_such_data"),
        ("tiny_missing_file", "paths in task files are relative to"),
        ("tiny_sampled", "samples or searches"),
    ],
)
def test_task_that_cannot_run_is_refused(name: str, cause: str) -> None:
    """A wrong name, data that is not there and sampling are found before any model is loaded."""
    with pytest.raises(UserError, match=f"--tasks {name}(.|\n)*{cause}"):
        load_tasks(options(name))


def test_more_solved_examples_than_documents_are_refused() -> None:
    """lm-eval draws them without repeating one, so there must be as many."""
    with pytest.raises(UserError, match=r"lm-eval cannot use it .*\n.*fewer --num-fewshot"):
        load_tasks(options("tiny_last_word", num_fewshot=6))


def broken_tasks(tmp_path: Path, old: str, new: str) -> Path:
    folder = Path(shutil.copytree(TASKS, tmp_path / "tasks"))
    file = folder / "tiny_choice.yaml"
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("test_split: test\nfewshot", "test_split: nowhere\nfewshot", "lm-eval cannot use it"),
        ("{{question}}", "{{question", "lm-eval cannot use it"),
        ("metadata:", "unsafe_code: true\nmetadata:", "runs code that the model writes"),
        ("task: tiny_choice", "task: [", "no task of that name"),
    ],
)
def test_broken_task_file_is_refused(tmp_path: Path, old: str, new: str, cause: str) -> None:
    """A split that is not there, a broken template, generated code and broken YAML name the task and the cause."""
    with pytest.raises(UserError, match=f"--tasks tiny_choice: .*{cause}"):
        load_tasks(options("tiny_choice", task_path=broken_tasks(tmp_path, old, new)))


def test_task_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    """A wrong path is not an empty collection."""
    with pytest.raises(UserError, match="no such directory"):
        load_tasks(options("tiny_choice", task_path=tmp_path / "nowhere"))

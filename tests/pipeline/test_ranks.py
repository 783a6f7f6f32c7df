"""Calibration in several processes gives what one process gives, and fails with one message."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.forked_ranks import Scenario, ScenarioResult, run_scenarios

WINDOWS, SEQ, BATCH = 7, 32, 2
"""Neither two nor four processes divide the windows. Two get whole batches, four do not."""
LAYERS = 2
RESULTS = ("policy.json", "policy.safetensors", "stats.safetensors")

Launches = tuple[Path, dict[str, ScenarioResult]]


@pytest.fixture(scope="module")
def launches(finished_run: Path, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """A directory with `run-NAME` of each launch, `run-one` of one process among them, and what the processes did."""
    directory = tmp_path_factory.mktemp("launches")
    ids = np.random.default_rng(0).integers(0, 512, (WINDOWS, SEQ))
    np.savez(directory / "ids.npz", input_ids=ids)
    np.savez(directory / "one-window.npz", input_ids=ids[:1])

    def words(run: str, *more: str, verb: str = "calibrate") -> tuple[str, ...]:
        output = directory / f"run-{run}"
        if not output.exists():
            output.mkdir()
            for file in ("manifest.json", "sites.json"):
                shutil.copy(finished_run / "run" / file, output)
        place = (str(output),) if verb == "rewrite" else (str(tiny_llama_dir), "-o", str(output))
        text = ("--calib-dataset", str(directory / "ids.npz"), "--calib-size", str(WINDOWS), "--calib-seq", str(SEQ))
        return (verb, *place, *text, "--batch-size", str(BATCH), "--weight-method", "gptq", "--device", "cpu", *more)

    scenarios = [
        Scenario("two", 2, words("two")),
        Scenario("four", 4, words("four")),
        Scenario("nan", 2, words("nan"), mischief="nan"),
        Scenario("bug", 2, words("bug"), mischief="bug"),
        Scenario("killed", 2, words("killed"), mischief="kill"),
        Scenario("resumed", 2, words("killed")),
        Scenario("killed-alone", 1, words("killed-alone"), mischief="kill"),
        Scenario("resumed-alone", 1, words("killed-alone", "--max-memory", "1B")),
        Scenario("few", 2, words("few", "--calib-size", "1")),
        Scenario("short-text", 2, words("short-text", "--calib-dataset", str(directory / "one-window.npz"))),
        Scenario("rewrite", 2, words("rewrite", verb="rewrite")),
    ]
    return directory, run_scenarios(directory, words("one"), scenarios)


def bytes_of(run: Path, names: tuple[str, ...] = RESULTS) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in names}


def test_two_processes_write_what_one_writes(launches: Launches) -> None:
    """With whole batches a rank, statistics and policy are those of one process, byte for byte."""
    directory, results = launches
    assert results["two"].codes == [0, 0]
    assert bytes_of(directory / "run-two") == bytes_of(directory / "run-one")


def test_four_processes_decide_what_one_decides(launches: Launches) -> None:
    """Smaller batches may round sums otherwise: the same decisions, activation scales within one ulp of float32."""
    directory, results = launches
    assert results["four"].codes == [0] * 4
    one, four = (layers_of(directory / f"run-{name}") for name in ("one", "four"))
    assert one.keys() == four.keys()
    for path, layer in one.items():
        scale, other = (np.float32(entry.pop("activation_scale")) for entry in (layer, four[path]))
        assert abs(scale - other) <= np.spacing(scale), path
        reasons = [entry.pop("reason").split("max|x|")[0] for entry in (layer, four[path])]
        assert reasons[0] == reasons[1], path
        assert layer == four[path]
    codes, others = (load_file(directory / f"run-{name}" / "policy.safetensors") for name in ("one", "four"))
    assert codes.keys() == others.keys()
    assert all(np.array_equal(codes[name], others[name]) for name in codes if name.endswith("scales"))


def layers_of(run: Path) -> dict[str, Any]:
    layers: dict[str, Any] = json.loads((run / "policy.json").read_text())["layers"]
    return {path: layer for path, layer in layers.items() if layer["activation_scale"] is not None}


@pytest.mark.parametrize("name", ["two", "four"])
def test_hessians_are_those_of_all_windows(launches: Launches, name: str) -> None:
    """The sum over ranks is the mean over all tokens, up to the order of a float32 sum."""
    directory, _ = launches
    one, several = (load_file(directory / f"run-{run}" / "hessians.safetensors") for run in ("one", name))
    assert one.keys() == several.keys()
    tokens = WINDOWS * SEQ
    for path, hessian in one.items():
        # Either sum has n rounded terms: (n + 1) half ulps of the sum of magnitudes (Higham 3.1), which for the mean of
        # x_i x_j is at most sqrt(H_ii H_jj). Twice, for two sums; inputs within an ulp add less than one term does.
        diagonal = np.sqrt(np.diag(hessian).astype(np.float64))
        bound = 2 * (tokens + 2) * 2.0**-24 * np.outer(diagonal, diagonal)
        assert (np.abs(hessian.astype(np.float64) - several[path]) <= bound).all(), path
        assert diagonal.max() > 0


def test_ranks_share_the_work(launches: Launches) -> None:
    """Every rank runs every block once, on its windows; one process alone writes to the terminal."""
    _, results = launches
    assert results["four"].blocks == [list(range(LAYERS))] * 4
    assert "calibrate" in results["four"].errors[0]
    assert results["four"].errors[1:] == [""] * 3


@pytest.mark.parametrize(("name", "code", "words"), [("nan", 1, "NaN or Inf"), ("bug", 2, "a planted bug")])
def test_a_rank_that_fails_ends_all_with_one_message(launches: Launches, name: str, code: int, words: str) -> None:
    """The rank that fails says why; the other ends with the same code, says nothing and does not hang."""
    directory, results = launches
    assert results[name].codes == [code, code]
    assert words in results[name].errors[1]
    assert "rror" not in results[name].errors[0]
    assert not (directory / f"run-{name}" / "stats.safetensors").exists()


def test_a_rank_that_is_killed_ends_all_with_one_message(launches: Launches) -> None:
    """The first rank says that a connection is lost, without a traceback."""
    _, results = launches
    assert results["killed"].codes == [1, -signal.SIGKILL]
    assert "connection to another process is lost" in results["killed"].errors[0]
    assert "Traceback" not in results["killed"].errors[0]


@pytest.mark.parametrize(("ranks", "suffix"), [(2, ""), (1, "-alone")])
def test_a_killed_calibration_goes_on_at_the_last_finished_block(launches: Launches, ranks: int, suffix: str) -> None:
    """After SIGKILL in the second block only that one runs again, and the result is that of an unbroken run."""
    directory, results = launches
    assert results[f"killed{suffix}"].blocks == [[0, 1]] * ranks
    assert results[f"resumed{suffix}"].codes == [0] * ranks
    assert results[f"resumed{suffix}"].blocks == [[1]] * ranks
    names = (*RESULTS, "hessians.safetensors")
    unbroken = "run-two" if ranks == 2 else "run-one"
    assert bytes_of(directory / f"run-killed{suffix}", names) == bytes_of(directory / unbroken, names)
    assert not (directory / f"run-killed{suffix}" / "calibration-state").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("few", "1 windows of text for 2 processes"),
        ("short-text", "1 windows of text for 2 processes"),
        ("rewrite", "this run does not calibrate"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_before_work(launches: Launches, name: str, words: str) -> None:
    """No block runs, one message is printed, and nobody waits for ever."""
    _, results = launches
    assert results[name].codes == [1, 0]
    assert words in results[name].errors[0]
    assert results[name].errors[1] == ""
    assert results[name].blocks == [[], []]

"""A session on real runs: the same texts as the graph gives elsewhere, and errors that say what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fptq_export.errors import UserError
from fptq_export.progress import NoProgress
from fptq_export.runtime import Sampling, Session
from fptq_export.verify.decode import greedy
from fptq_export.verify.sessions import OnnxCausalSession

PROMPT = "An assignment"
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def session(finished_run: Path) -> Session:
    """On the tiny LLaMA."""
    return Session.open(finished_run / "run", threads=1, kernels="stock")


@pytest.fixture
def run_without_weights(finished_run: Path, tmp_path: Path) -> Path:
    """The run's documents and tokenizer."""
    names = ("manifest.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for name in names:
        shutil.copy(finished_run / "run" / name, tmp_path)
    return tmp_path


def test_greedy_text_is_the_graphs(session: Session, finished_run: Path) -> None:
    """Tokens are those of the loop that verification runs."""
    model = OnnxCausalSession(finished_run / "run" / "model.w4a8.onnx", threads=1)
    ids = session.tokens(PROMPT)
    with NoProgress().task("greedy", None) as task:
        expected, _ = greedy(model, np.array(ids), NEW_TOKENS, task)
    completion = session.generate(PROMPT, Sampling(max_tokens=NEW_TOKENS, ignore_eos=True))
    assert list(completion.token_ids) == expected
    assert completion.prompt_tokens == len(ids)
    assert 0.0 < completion.first_token_seconds < completion.seconds


def test_seed_repeats_a_text(session: Session) -> None:
    """Sampled, twice the same."""
    sampling = Sampling(max_tokens=NEW_TOKENS, temperature=1.0, top_p=0.9, seed=3)
    assert session.generate(PROMPT, sampling).token_ids == session.generate(PROMPT, sampling).token_ids


def test_what_runs_it_is_said(session: Session) -> None:
    """ONNX Runtime, and why not the engine that is there."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, so the engine runs")
    assert session.backend == "onnxruntime"
    assert session.note == "no NVIDIA GPU is seen here"


def test_limits_are_those_of_the_run(session: Session, finished_run: Path) -> None:
    """A text that the engine would refuse is refused here too."""
    options = json.loads((finished_run / "run" / "manifest.json").read_text())["options"]
    assert session.limits.max_input_len == options["max_input_len"]
    assert session.limits.max_kv_len == options["max_kv_len"]
    with pytest.raises(UserError, match="--max-input-len"):
        session.generate([5] * (options["max_input_len"] + 1))


@pytest.mark.parametrize("name", ["out.plan", "run/model.w4a8.onnx"])
def test_engine_and_graph_lead_to_the_run(session: Session, finished_run: Path, name: str) -> None:
    """Each opens with tokenizer and limits."""
    opened = Session.open(finished_run / name, threads=1, kernels="stock")
    assert opened.limits == session.limits
    sampling = Sampling(max_tokens=3, ignore_eos=True)
    assert opened.generate(PROMPT, sampling).text == session.generate(PROMPT, sampling).text


def test_arrays_and_tensors_go_in_and_come_out(session: Session) -> None:
    """Logits have the type of the ids, and the same values."""
    ids = [session.tokens(PROMPT)]
    array, cache = session.prefill(np.array(ids, np.int32))
    tensor, tensor_cache = session.prefill(torch.tensor(ids))
    assert isinstance(array, np.ndarray)
    assert isinstance(tensor, torch.Tensor)
    assert np.array_equal(array, tensor.numpy())
    following, _ = session.decode(np.array([[7]]), cache)
    following_tensor, _ = session.decode(torch.tensor([[7]]), tensor_cache)
    assert np.array_equal(following, following_tensor.numpy())


@pytest.mark.parametrize(
    "ids",
    [np.zeros(3, np.int64), np.zeros((1, 0), np.int64), np.zeros((1, 3), np.float32)],
    ids=["rank", "empty", "dtype"],
)
def test_wrong_ids_are_refused(session: Session, ids: object) -> None:
    """Shape and type are named."""
    with pytest.raises(UserError, match="input_ids"):
        session.prefill(ids)


def test_token_beyond_the_vocabulary_is_an_error(session: Session) -> None:
    """Not a crash, nor another token."""
    with pytest.raises(UserError, match="100000 is no token"):
        session.generate([100_000])


def test_engine_that_cannot_run_here_is_refused_when_asked_for(finished_run: Path) -> None:
    """The reason is given, and the way out."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, so the engine runs")
    with pytest.raises(UserError, match=r"out\.plan: no NVIDIA GPU") as caught:
        Session.open(finished_run / "run", backend="tensorrt")
    assert "auto" in caught.value.hint


def test_run_without_an_engine_says_so(run_without_weights: Path) -> None:
    """Where there is nothing to run, the command that builds it is named."""
    path = run_without_weights / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["stages"]["build"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="fptq-export build"):
        Session.open(run_without_weights, backend="tensorrt")


def test_missing_graph_is_named(run_without_weights: Path) -> None:
    """The file that is not there, not what failed because of it."""
    with pytest.raises(UserError, match=r"model\.w4a8\.onnx: no such file"):
        Session.open(run_without_weights, backend="onnxruntime")


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_what_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    """No file, or a directory without a manifest."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no such file" if name == "nothing" else "not a run directory"):
        Session.open(tmp_path / name)


def test_engine_without_a_run_is_refused(tmp_path: Path) -> None:
    """Nothing says what it is, so it is not guessed."""
    (tmp_path / "lost.plan").write_bytes(b"x")
    with pytest.raises(UserError, match="no manifest beside it"):
        Session.open(tmp_path / "lost.plan")


def test_run_of_an_encoder_is_refused(run_without_weights: Path) -> None:
    """It writes no text."""
    path = run_without_weights / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["options"]["task"] = "encoder"
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="writes no text"):
        Session.open(run_without_weights)


def test_run_without_a_tokenizer_takes_ids(finished_run: Path, tmp_path: Path) -> None:
    """Text is refused, ids are not."""
    run = shutil.copytree(finished_run / "run", tmp_path / "run")
    (run / "tokenizer.json").unlink()
    with Session.open(run, threads=1) as session:
        assert len(session.generate([5, 6], Sampling(max_tokens=2)).token_ids) == 2
        with pytest.raises(UserError, match=r"no tokenizer\.json"):
            session.generate(PROMPT)

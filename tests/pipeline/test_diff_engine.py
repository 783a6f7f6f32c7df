"""An engine's session, shown on Polygraphy's ONNX Runtime runner; and the reasons why an engine is left out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from polygraphy.backend.onnxrt import OnnxrtRunner

from fptq_export.diff import engine_session
from fptq_export.diff.engine_session import RunnerSession, engine_problem
from fptq_export.verify.reference import body_session_from_path
from fptq_export.verify.sessions import OnnxCausalSession


def test_runner_session_carries_the_cache_as_the_onnx_session_does(finished_run: Path) -> None:
    """Prefill and two decode steps give the bits of OnnxCausalSession on the same graph and the same runtime."""
    graph = finished_run / "run" / "model.w4a8.onnx"
    ids = np.random.default_rng(0).integers(0, 512, (1, 6))
    expected = OnnxCausalSession(graph, threads=None)
    with OnnxrtRunner(lambda: body_session_from_path(graph)) as runner:
        found = RunnerSession(runner, "engine")
        logits, cache = expected.prefill(ids[:, :4])
        same, carried = found.prefill(ids[:, :4])
        assert np.array_equal(same, logits)
        for step in (4, 5):
            token = ids[:, step : step + 1]
            logits, cache = expected.decode(token, cache)
            same, carried = found.decode(token, carried)
            assert np.array_equal(same, logits), step


def manifest(**options: Any) -> Any:
    """As much of a manifest as is read."""
    known = {"kv_cache": "concat", "logits": "all", "dtype": "fp16", "plugin": "off"}
    return SimpleNamespace(options=SimpleNamespace(**{**known, **options}))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kv_cache": "static"}, "written in place"),
        ({"logits": "last"}, "last token only"),
        ({"dtype": "bf16"}, "BF16"),
        ({}, "no NVIDIA GPU"),
    ],
)
def test_engine_that_cannot_run_has_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], reason: str
) -> None:
    """Each form that Polygraphy's runner cannot carry, and a machine without GPU, are named in words."""
    engine = tmp_path / "out.plan"
    engine.write_bytes(b"engine")
    monkeypatch.setattr(engine_session, "visible_gpus", lambda: 0)
    assert reason in str(engine_problem(manifest(**options), engine))


def test_missing_engine_has_a_reason(tmp_path: Path) -> None:
    """No engine, and one that was moved away, name the verb that builds it."""
    assert "fptq-export build" in str(engine_problem(manifest(), None))
    assert "is not there" in str(engine_problem(manifest(), tmp_path / "gone.plan"))


def test_engine_on_a_gpu_has_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reasons above are the only ones: with a GPU the default form is run."""
    engine = tmp_path / "out.plan"
    engine.write_bytes(b"engine")
    monkeypatch.setattr(engine_session, "visible_gpus", lambda: 1)
    assert engine_problem(manifest(), engine) is None

"""Opening an engine: what is refused, in whose words, and that the double has nothing that TensorRT lacks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import polygraphy.cuda.cuda as polygraphy_cuda
import pytest

from fptq_export.build.targets import Target
from fptq_export.build.tensorrt import tensorrt_for_target
from fptq_export.errors import UserError
from fptq_export.plugin.library import DIRECTORY_VARIABLE
from fptq_export.runtime import engine_session
from fptq_export.runtime.engine_session import engine_problem, opened_engine
from tests.runtime import fake_tensorrt
from tests.runtime.engines import LIMITS, manifest, tokens
from tests.runtime.fake_tensorrt import FakeTensorRT


def test_refused_plan_says_what_tensorrt_said(tensorrt: FakeTensorRT, tmp_path: Path) -> None:
    """Errors of its logger, without warnings; and no device memory is left."""
    (tmp_path / "out.plan").write_bytes(b"no plan")
    with (
        pytest.raises(UserError, match=r"cannot load it \(Serialization assertion magicTagRead == kMAGIC_TAG failed\)"),
        opened_engine(manifest(), tmp_path / "out.plan"),
    ):
        pass
    assert not tensorrt.cudart.live


def test_plugin_is_loaded_once_before_the_plan(
    graphs: dict[str, Path], tensorrt: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its creators must be there when the plan is read; a second session finds them registered."""
    (tmp_path / "libfptq_trt.so").touch()
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    plan = fake_tensorrt.plan_of_graph(graphs["concat"], tmp_path / "with.plan", (LIMITS,), plugin=True)
    for _ in range(2):
        with opened_engine(manifest(plugin_layers=4), plan) as session:
            assert np.isfinite(session.prefill(tokens())[0]).all()
    assert len(tensorrt.registry.all_creators) == 1


def test_plan_without_its_plugin_is_refused(graphs: dict[str, Path], tensorrt: FakeTensorRT, tmp_path: Path) -> None:
    """TensorRT's own words name the missing one."""
    plan = fake_tensorrt.plan_of_graph(graphs["concat"], tmp_path / "with.plan", (LIMITS,), plugin=True)
    with pytest.raises(UserError, match="Could not find plugin"), opened_engine(manifest(), plan):
        pass


def test_plan_that_carries_its_plugin_asks_for_no_library(
    graphs: dict[str, Path], tensorrt: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code may run because its manifest says so, and none is loaded beside it; without that word it is refused."""
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    plan = fake_tensorrt.plan_of_graph(graphs["concat"], tmp_path / "with.plan", (LIMITS,), embedded=True)
    with opened_engine(manifest(plugin_layers=4, embedded=True), plan) as session:
        assert np.isfinite(session.prefill(tokens())[0]).all()
    assert not tensorrt.registry.all_creators
    with pytest.raises(UserError, match="host code is not allowed"), opened_engine(manifest(), plan):
        pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"types": {"logits": "FP8"}}, "has the type FP8 @ logits"),
        ({"host": ["attention_mask"]}, "is read in the memory of the CPU @ attention_mask"),
    ],
)
def test_tensor_that_cannot_be_bound_is_refused(
    graphs: dict[str, Path], tensorrt: FakeTensorRT, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    """By name, before it is run."""
    plan = fake_tensorrt.plan_of_graph(graphs["concat"], tmp_path / "out.plan", (LIMITS,), **options)
    with pytest.raises(UserError, match=words), opened_engine(manifest(), plan):
        pass


def test_engine_of_another_model_is_refused(tensorrt: FakeTensorRT, tmp_path: Path) -> None:
    """All that a language model would have, and all that nothing fills, is named."""
    text = "<ir_version: 10, opset_import: ['' : 21]> m (float[batch, 8] pixels) => (float[batch, 8] scores)"
    onnx.save(onnx.parser.parse_model(text.replace("'", '"') + " { scores = Relu(pixels) }"), tmp_path / "m.onnx")
    document = {"graph": str(tmp_path / "m.onnx"), "types": {}, "host": [], "plugin": False, "embedded": False}
    document["profiles"] = [{"pixels": [[1, 8], [1, 8], [2, 8]]}]
    (tmp_path / "out.plan").write_text(json.dumps(document))
    with (
        pytest.raises(UserError, match="input that nothing fills @ pixels") as caught,
        opened_engine(manifest(), tmp_path / "out.plan"),
    ):
        pass
    for what in ("input @ input_ids", "input @ past_key_values.0.key", "output @ logits"):
        assert f"missing {what}" in str(caught.value)


def test_machine_without_cuda_is_refused(
    graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No runtime library of CUDA: said with what to install."""

    def missing() -> None:
        raise OSError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(polygraphy_cuda, "G_CUDA", None)
    monkeypatch.setattr(polygraphy_cuda, "Cuda", missing)
    plan = fake_tensorrt.plan_of_graph(graphs["concat"], tmp_path / "out.plan", (LIMITS,))
    with pytest.raises(UserError, match=r"libcudart\.so: cannot open") as caught, opened_engine(manifest(), plan):
        pass
    assert "nvidia-cuda-runtime" in caught.value.hint


def test_engine_that_cannot_run_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None was built, it was moved away, or there is no GPU; with one there is no reason, whatever its form."""
    engine = tmp_path / "out.plan"
    engine.write_bytes(b"engine")
    monkeypatch.setattr(engine_session, "visible_gpus", lambda: 0)
    assert "fptq-export build" in str(engine_problem(manifest(), None))
    assert "is not there" in str(engine_problem(manifest(), tmp_path / "gone.plan"))
    assert "no NVIDIA GPU" in str(engine_problem(manifest(), engine))
    monkeypatch.setattr(engine_session, "visible_gpus", lambda: 1)
    assert engine_problem(manifest(), engine) is None


@pytest.mark.parametrize("target", [Target.TENSORRT, Target.TENSORRT_RTX])
def test_double_has_nothing_that_tensorrt_lacks(target: Target) -> None:
    """What the runtime calls is in the double, so it is in TensorRT: each method, property and constant by name."""
    module = {Target.TENSORRT: "tensorrt", Target.TENSORRT_RTX: "tensorrt_rtx"}[target]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    real = tensorrt_for_target(target)
    for name in ("Runtime", "ICudaEngine", "IExecutionContext", "IPluginRegistry", "ILogger"):
        known = dir(getattr(real, name))
        ours = [key for key in vars(getattr(fake_tensorrt, name)) if not key.startswith("_")]
        assert set(ours) - {"all_creators"} <= set(known), name
    assert hasattr(real.get_plugin_registry(), "all_creators")
    assert {"INPUT", "OUTPUT"} <= set(real.TensorIOMode.__members__)
    assert {"DEVICE", "HOST"} <= set(real.TensorLocation.__members__)
    assert set(fake_tensorrt.TYPES) <= set(real.DataType.__members__)
    assert {level.name: int(level) for level in fake_tensorrt.Severity} == {
        name: int(level) for name, level in real.ILogger.Severity.__members__.items()
    }

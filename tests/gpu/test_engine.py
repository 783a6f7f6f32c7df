"""SmolLM2 with the plugin, built and run by TensorRT, against ONNX Runtime's run of `model.w4a8.onnx`."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fptq_export.build.targets import Target
from fptq_export.cli.main import main
from fptq_export.plugin.library import DIRECTORY_VARIABLE
from fptq_export.verify.decode import CacheBound
from fptq_export.verify.sessions import OnnxCausalSession
from tests.gpu.engine_run import EngineRun

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

TOKENS = np.random.default_rng(0).integers(5, 40000, (1, 32))


@pytest.fixture(scope="module")
def built(
    target: Target, smollm2_gguf: Path, plugin_library: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EngineRun, OnnxCausalSession]:
    """The engine, and the graph it was made from in ONNX Runtime."""
    directory = tmp_path_factory.mktemp(re.sub(r"\W", "-", str(target)))
    words = [str(smollm2_gguf), "-o", str(directory / "run"), "--engine", str(directory / "out.plan")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DIRECTORY_VARIABLE, str(plugin_library.parent))
        assert main([*words, "--plugin", "on", "--target", str(target), "--eval-windows", "1"]) == 0
    session = OnnxCausalSession(directory / "run" / "model.w4a8.onnx", threads=None, name="onnxruntime")
    return EngineRun(target, (directory / "out.plan").read_bytes(), plugin_library), session


def checked_logits(outputs: dict[str, torch.Tensor], session: OnnxCausalSession) -> None:
    """Logits within the bound of two runs whose roundings fall apart (derived at `CacheBound`)."""
    expected, _ = session.prefill(TOKENS)
    bound = CacheBound(rounding="int8", layers=session.layers).relative * np.abs(expected).max()
    distance = np.abs(outputs["logits"].float().cpu().numpy() - expected).max()
    assert distance <= bound, f"logits differ by {distance:.3g}, bound {bound:.3g}"


def test_logits_equal_those_of_the_graph(built: tuple[EngineRun, OnnxCausalSession]) -> None:
    """The deserialized engine runs the plugin and gives the graph's logits."""
    engine, session = built
    outputs = engine.prepare(session.prefill_feed(TOKENS))
    engine.enqueue()
    torch.cuda.synchronize()
    checked_logits(outputs, session)


def test_engine_runs_on_another_stream(built: tuple[EngineRun, OnnxCausalSession]) -> None:
    """On a stream that is not the default one the result is the same, bit for bit."""
    engine, session = built
    outputs = engine.prepare(session.prefill_feed(TOKENS))
    engine.enqueue()
    torch.cuda.synchronize()
    first = outputs["logits"].clone()
    outputs["logits"].zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        engine.enqueue()
    stream.synchronize()
    assert torch.equal(outputs["logits"], first)


def test_engine_is_captured_in_a_graph(built: tuple[EngineRun, OnnxCausalSession]) -> None:
    """Captured after one ordinary run, as TensorRT asks for, and replayed: the same bits."""
    engine, session = built
    outputs = engine.prepare(session.prefill_feed(TOKENS))
    engine.enqueue()
    torch.cuda.synchronize()
    first = outputs["logits"].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.enqueue()
    outputs["logits"].zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(outputs["logits"], first)
    checked_logits(outputs, session)

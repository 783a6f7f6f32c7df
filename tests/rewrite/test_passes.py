from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.graph_io import data_path
from fptq_export.policy import PolicyArrays
from fptq_export.progress import NoProgress, Task
from fptq_export.rewrite import RewritePaths, rewrite
from tests.rewrite.conftest import Rewritten
from tests.support.policies import float_weight
from tests.support.process_memory import is_mapped
from tests.support.traced import FP32_LOGITS, Traced, causal_feed, run

FP32_REWRITTEN = ("llama_rewritten", "opt_rewritten")
ALL_REWRITTEN = (*FP32_REWRITTEN, "llama_rewritten_fp16")
FORMS = ("qdq", "w4a8", "lowered")
ACCURACY = "session.qdq_matmulnbits_accuracy_level"
"""How ONNX Runtime multiplies block-INT4 weights once it has fused them: 1 in float32; 4, the default, in INT8."""


def _logits(graph: Path, ids: NDArray[np.int64], **how: Any) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = run(graph, causal_feed(graph, ids), outputs=["logits"], **how)["logits"]
    return logits


@pytest.mark.parametrize("fixture", ALL_REWRITTEN)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_passes_the_checker_and_runs(
    request: pytest.FixtureRequest, fixture: str, form: str, ids: NDArray[np.int64]
) -> None:
    """Stock ONNX and stock ONNX Runtime accept all three files, with no custom library."""
    rewritten: Rewritten = request.getfixturevalue(fixture)
    path: Path = getattr(rewritten, form)
    onnx.checker.check_model(str(path))
    logits = _logits(path, ids)
    assert logits.shape == (*ids.shape, 512)
    assert np.isfinite(logits.astype(np.float32)).all()


@pytest.mark.parametrize("fixture", FP32_REWRITTEN)
def test_all_forms_of_a_float32_graph_give_the_same_bits(
    request: pytest.FixtureRequest, fixture: str, ids: NDArray[np.int64]
) -> None:
    """Q/DQ, fused and lowered are one program: logits and cache agree bit for bit, for a prompt and after it."""
    rewritten: Rewritten = request.getfixturevalue(fixture)
    results = [run(path, causal_feed(path, ids)) for path in (rewritten.qdq, rewritten.w4a8, rewritten.lowered)]
    for _ in range(2):
        for name, expected in results[0].items():
            for other in results[1:]:
                np.testing.assert_array_equal(other[name], expected, err_msg=name)
        past = {k.replace("present", "past_key_values"): v for k, v in results[0].items() if k != "logits"}
        results = [
            run(path, causal_feed(path, ids[:, :1], past))
            for path in (rewritten.qdq, rewritten.w4a8, rewritten.lowered)
        ]


@pytest.mark.parametrize("fixture", FP32_REWRITTEN)
def test_quantization_is_seen_in_the_logits(
    request: pytest.FixtureRequest, fixture: str, ids: NDArray[np.int64]
) -> None:
    """The rewritten graph is another model than the float one, and still near it: INT4 weights are at work."""
    rewritten: Rewritten = request.getfixturevalue(fixture)
    before, after = (_logits(path, ids).reshape(-1) for path in (rewritten.traced.model, rewritten.w4a8))
    assert np.abs(after - before).max() > 100 * FP32_LOGITS * np.abs(before).max()
    cosine = float(before @ after / np.linalg.norm(before) / np.linalg.norm(after))
    assert cosine > 0.9, "random models in INT4: far below what a folding or layout error leaves"


@pytest.mark.parametrize("fixture", FP32_REWRITTEN)
@pytest.mark.parametrize("form", FORMS)
def test_optimized_session_agrees_at_accuracy_level_1(
    request: pytest.FixtureRequest, fixture: str, form: str, ids: NDArray[np.int64]
) -> None:
    """With every graph optimization the logits are those of the plain graph, if block-INT4 MatMuls run in float32."""
    path: Path = getattr(request.getfixturevalue(fixture), form)
    plain = _logits(path, ids)
    optimized = _logits(path, ids, optimized=True, entries={ACCURACY: "1"})
    np.testing.assert_allclose(optimized, plain, rtol=0.0, atol=FP32_LOGITS * np.abs(plain).max())


@pytest.mark.parametrize("form", FORMS)
def test_optimized_session_differs_at_the_default_level(
    llama_rewritten: Rewritten, form: str, ids: NDArray[np.int64]
) -> None:
    """The trap: by default ONNX Runtime quantizes the activations of fused block-INT4 MatMuls once more.

    If this fails, the default has changed and the sessions of `verify` no longer need to set the level.
    """
    path: Path = getattr(llama_rewritten, form)
    plain = _logits(path, ids)
    optimized = _logits(path, ids, optimized=True)
    assert np.abs(optimized - plain).max() > 100 * FP32_LOGITS * np.abs(plain).max()


HALF_TO_INT8 = 2.0**-11 / 2.0**-8
"""A rounding to FP16 against one to INT8, relative to the largest value: what FP16 may add to the quantization."""


def test_forms_of_a_half_graph_differ_by_roundings_to_half(
    llama_rewritten_fp16: Rewritten, ids: NDArray[np.int64]
) -> None:
    """ONNX Runtime computes FP16 MatMuls in FP32 and drops casts before them, in one form and not in the other.

    So the forms of an FP16 graph differ by FP16 roundings (and INT8 codes that these tip over), which are small beside
    the quantization itself. Fused and lowered are the same program to the bit.
    """
    rewritten = llama_rewritten_fp16
    qdq, w4a8, lowered = (_logits(getattr(rewritten, form), ids).astype(np.float64) for form in FORMS)
    exact = _logits(rewritten.traced.model, ids).astype(np.float64)
    np.testing.assert_array_equal(lowered, w4a8)
    assert np.sqrt(np.mean((w4a8 - qdq) ** 2)) < HALF_TO_INT8 * np.sqrt(np.mean((qdq - exact) ** 2))


def test_forms_share_one_data_file(llama_rewritten: Rewritten) -> None:
    """Q/DQ and fused form lie beside one data file and both name it."""
    directory = llama_rewritten.w4a8.parent
    assert {path.name for path in directory.glob("*.data")} == {"model.w4a8.onnx.data"}
    for path in (llama_rewritten.qdq, llama_rewritten.w4a8, llama_rewritten.lowered):
        tensors = onnx.load(path, load_external_data=False).graph.initializer
        locations = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
        assert locations == {"model.w4a8.onnx.data"}


def test_files_can_be_moved(llama_rewritten: Rewritten, ids: NDArray[np.int64], tmp_path: Path) -> None:
    """A graph and its data run from another directory: no path of the machine that wrote them is inside."""
    for path in (llama_rewritten.w4a8, data_path(llama_rewritten.w4a8)):
        shutil.copy(path, tmp_path)
    moved = tmp_path / llama_rewritten.w4a8.name
    np.testing.assert_array_equal(_logits(moved, ids), _logits(llama_rewritten.w4a8, ids))


def test_rewriting_twice_gives_the_same_bytes(llama_rewritten: Rewritten, tmp_path: Path) -> None:
    """Equal inputs give equal files, so hashes can tell what changed."""
    paths = RewritePaths(llama_rewritten.traced.model, tmp_path / "model.qdq.onnx", tmp_path / "model.w4a8.onnx")
    rewrite(paths, llama_rewritten.traced.sites, llama_rewritten.policy, llama_rewritten.arrays, NoProgress())
    for name in ("model.qdq.onnx", "model.w4a8.onnx", "model.w4a8.onnx.data"):
        assert (tmp_path / name).read_bytes() == (llama_rewritten.w4a8.parent / name).read_bytes(), name


def test_traced_model_is_not_changed(llama_fp32: Traced, llama_rewritten: Rewritten, ids: NDArray[np.int64]) -> None:
    """A stage never changes its input: the float graph still multiplies by the checkpoint's weights."""
    from safetensors import safe_open

    from fptq_export.graph_io import load_graph

    linear = llama_fp32.sites.linear("model.layers.0.mlp.down_proj")
    with safe_open(str(llama_fp32.checkpoint / "model.safetensors"), framework="np") as stored:
        expected = stored.get_tensor(f"{linear.path}.weight")
    np.testing.assert_array_equal(float_weight(load_graph(llama_fp32.model), linear), expected)
    assert llama_rewritten.policy.equalized_sites()


def test_missing_array_leaves_no_graph(llama_rewritten: Rewritten, tmp_path: Path) -> None:
    """Arrays of another run are refused by name, and no graph stands there that would look finished."""
    from safetensors.numpy import load_file, save_file

    arrays = load_file(llama_rewritten.arrays.path)
    missing = next(name for name in arrays if name.endswith(".weight_scales"))
    del arrays[missing]
    save_file(arrays, tmp_path / "policy.safetensors")
    out = tmp_path / "out"
    paths = RewritePaths(llama_rewritten.traced.model, out / "model.qdq.onnx", out / "model.w4a8.onnx")
    with pytest.raises(UserError, match=f"{missing}' is missing".replace(".", r"\.")):
        rewrite(
            paths,
            llama_rewritten.traced.sites,
            llama_rewritten.policy,
            PolicyArrays(tmp_path / "policy.safetensors"),
            NoProgress(),
        )
    assert not list(out.glob("*.onnx"))
    assert not list(out.glob(".*"))


def test_no_weight_stays_mapped_while_the_quantized_ones_are_written(
    llama_rewritten: Rewritten, tmp_path: Path
) -> None:
    """Pages that stay resident add up: in the end to the whole policy, and to every weight that a fold reads."""
    sources = (data_path(llama_rewritten.traced.model), llama_rewritten.arrays.path)
    mapped: list[bool] = []

    class Watch:
        def advance(self, amount: float = 1.0) -> None:
            raise AssertionError("the task is told what is done in all")

        def update(self, completed: float, total: float | None = None) -> None:
            mapped.append(any(is_mapped(source) for source in sources))

    class Watching:
        @contextmanager
        def task(self, description: str, total: float | None, unit: str = "") -> Iterator[Task]:
            yield Watch()

    traced = llama_rewritten.traced
    paths = RewritePaths(traced.model, tmp_path / "model.qdq.onnx", tmp_path / "model.w4a8.onnx")
    rewrite(paths, traced.sites, llama_rewritten.policy, llama_rewritten.arrays, Watching())
    assert mapped
    assert not any(mapped)
    assert not any(is_mapped(source) for source in sources)

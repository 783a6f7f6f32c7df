"""What static layers clip: pooled over every call of a session, whatever runs it, and counted for Prometheus."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fptq_export.cpu.build import operators_path
from fptq_export.cpu.extension import BUILD_COMMAND
from fptq_export.errors import UserError
from fptq_export.monitor.totals import RangeTotals
from fptq_export.policy import read_policy
from fptq_export.range_outputs import METADATA_KEY, OUTPUT_NAME, RangeOutputs, RangeRow, read_range_outputs
from fptq_export.runtime import Session
from fptq_export.runtime.engine_session import EngineCausalSession
from fptq_export.runtime.metrics import Metrics
from fptq_export.runtime.ranges import RangeMonitor, range_monitor_of
from fptq_export.verify.sessions import OnnxCausalSession, session_from_path
from tests.runtime.engines import logits_of, tokens

IDS, PROMPT, STEPS = tokens(2, 24), 16, 8
"""Two random texts, [2, 24]: prompt and steps."""
EDGE = 1
"""Values of a row that may lie on the edge of the range, where FP16 and FLOAT round to either side."""
FORM_TOLERANCE = 2.0**-7
"""Relative, of the largest input of a layer: FP16 rounds to 2^-11, a dozen times from the embedding to the last layer,
where the form for the CPU kernels computes in FLOAT."""
VALUES, SATURATED = "fptq_static_activation_values_total", "fptq_static_activation_saturated_values_total"
ROWS = RangeOutputs(
    rows=(
        RangeRow(layers=("a.q_proj", "a.k_proj"), scale=0.125, calibrated_absmax=1.0),
        RangeRow(layers=("e.up",), scale=0.125, calibrated_absmax=1.0, expert="e"),
        RangeRow(layers=("o_proj",), scale=0.125, calibrated_absmax=None),
    )
)


@pytest.fixture(scope="module")
def expected(run_with_ranges: Path) -> RangeTotals:
    """The output of each call of a text as plain ONNX Runtime gives it, pooled."""
    path = run_with_ranges / "model.w4a8.onnx"
    session, plain, ids = OnnxCausalSession(path, threads=1), session_from_path(path, 1, "all"), IDS
    feeds = [session.prefill_feed(ids[:, :PROMPT])]
    _, cache = session.prefill(ids[:, :PROMPT])
    for token in ids[:, PROMPT:].T:
        feeds.append(session.decode_feed(token[:, None], cache))
        _, cache = session.decode(token[:, None], cache)
    calls = [plain.run([OUTPUT_NAME], feed)[0] for feed in feeds]
    totals = RangeTotals.none(calls[0].shape[0]).with_calls(np.stack(calls).astype(np.float64))
    assert totals.clipped.sum() > EDGE, "nothing is clipped: choose another text"
    return totals


@pytest.mark.parametrize("kernels", ["stock", "cpu"])
def test_session_pools_its_calls(
    run_with_ranges: Path, expected: RangeTotals, kernels: Literal["stock", "cpu"]
) -> None:
    """Prompt and steps, in the graph and in its form for the CPU kernels, whose cache is written in place."""
    if kernels == "cpu" and not operators_path().is_file():
        pytest.skip(f"the CPU kernels are not built; next: {BUILD_COMMAND}")
    with Session.open(run_with_ranges, backend="onnxruntime", threads=1, kernels=kernels) as session:
        assert session.ranges is not None
        logits_of(session, IDS, PROMPT)
        found = session.ranges.totals
    assert session.ranges.outputs == read_range_outputs(run_with_ranges / "range_outputs.json")
    assert found.calls == 1 + STEPS
    assert found.values.tolist() == expected.values.tolist()
    exact = kernels == "stock"
    assert (np.abs(found.clipped - expected.clipped) <= (0 if exact else EDGE)).all()
    assert (np.abs(found.peak / expected.peak - 1) <= (0 if exact else FORM_TOLERANCE)).all()


def test_values_are_tokens_by_channels(run_with_ranges: Path, expected: RangeTotals) -> None:
    """No padding, and no token twice: each that was run was quantized once."""
    layers = read_policy(run_with_ranges / "policy.json").layers
    rows = read_range_outputs(run_with_ranges / "range_outputs.json").rows
    widths = [layers[row.layers[0]].in_features for row in rows]
    assert expected.values.tolist() == [IDS.size * width for width in widths]


def test_engine_pools_its_calls(run_with_ranges: Path, expected: RangeTotals, opened: Callable[..., Any]) -> None:
    """The output is fetched from the GPU with the logits."""
    ranges = read_range_outputs(run_with_ranges / "range_outputs.json")
    engine: EngineCausalSession = opened(run_with_ranges / "model.w4a8.onnx", ranges=ranges)
    monitor = range_monitor_of(engine)
    assert monitor is not None
    logits_of(engine, IDS, PROMPT)
    for found, right in zip(vars(monitor.totals).values(), vars(expected).values(), strict=True):
        np.testing.assert_array_equal(found, right)


def test_engine_of_another_graph_is_not_counted(run_with_ranges: Path, opened: Callable[..., Any]) -> None:
    """Its rows are others than the run describes now, and a layer must not get the numbers of another one."""
    assert range_monitor_of(opened(run_with_ranges / "model.w4a8.onnx", ranges=ROWS)) is None
    assert range_monitor_of(opened(run_with_ranges / "model.onnx", ranges=ROWS)) is None


def test_run_without_the_output_has_no_such_metric(finished_run: Path) -> None:
    """It is absent and not 0, which would say that nothing is clipped."""
    with Session.open(finished_run / "run", backend="onnxruntime", kernels="stock", threads=1) as session:
        assert session.ranges is None
        assert b"static" not in Metrics("m", ranges=session.ranges).page()


@pytest.mark.parametrize("text", ["{}", ROWS.model_dump_json()], ids=["unreadable", "other rows"])
def test_metadata_that_do_not_fit_are_refused(run_with_ranges: Path, tmp_path: Path, text: str) -> None:
    """The graph was changed by hand; the command that writes it is named."""
    model = onnx.load(run_with_ranges / "model.w4a8.onnx")
    next(item for item in model.metadata_props if item.key == METADATA_KEY).value = text
    onnx.save(model, tmp_path / "model.w4a8.onnx", save_as_external_data=False)
    with pytest.raises(UserError, match=METADATA_KEY) as caught:
        OnnxCausalSession(tmp_path / "model.w4a8.onnx", threads=1)
    assert "--emit-range-outputs" in caught.value.hint


def test_threads_lose_no_call() -> None:
    """An engine's calls come from several threads at once."""
    monitor = RangeMonitor(ROWS)
    rows = np.tile(np.array([0.5, 1.0, 64.0], np.float32), (3, 1))

    def add() -> None:
        for _ in range(200):
            monitor.add(rows)

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.totals.calls == 1600
    assert monitor.totals.clipped.tolist() == [1600 * 32.0] * 3


def samples(metrics: Metrics) -> dict[tuple[str, str], float]:
    """Metric and layers -> value of what is counted for each static layer, as it is scraped."""
    families = text_string_to_metric_families(metrics.page().decode())
    found = [sample for family in families for sample in family.samples if "static" in sample.name]
    assert {sample.labels["model_name"] for sample in found} <= {"m"}
    return {(sample.name, sample.labels["layers"]): sample.value for sample in found}


def test_counters_are_of_static_layers_and_of_no_expert() -> None:
    """By the names that people are shown, from 0 on; experts quantize tokens that are not theirs."""
    monitor = RangeMonitor(ROWS)
    metrics = Metrics("m", ranges=monitor)
    names = ("a.q_proj, k_proj", "o_proj")
    assert samples(metrics) == dict.fromkeys([(name, layers) for name in (VALUES, SATURATED) for layers in names], 0.0)
    for rate in (0.25, 0.5):
        monitor.add(np.array([[rate, 1.0, 64.0], [1.0, 9.0, 64.0], [0.0, 0.5, 32.0]], np.float32))
    assert samples(metrics) == {
        (VALUES, "a.q_proj, k_proj"): 128.0,
        (SATURATED, "a.q_proj, k_proj"): 48.0,
        (VALUES, "o_proj"): 64.0,
        (SATURATED, "o_proj"): 0.0,
    }

"""Run directories with every file a report reads, written through the schemas: no model runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.auto.report import AutoReport, ParetoPoint, PolicyTotals, write_auto_report
from fptq_export.debug.report import DebugReport, Fault, LayerReport, Match
from fptq_export.evaluate.options import System
from fptq_export.evaluate.report import EvalReport, MetricFigures, MetricResult, SystemRecord, TaskResult, TextResult
from fptq_export.files import write_json_model
from fptq_export.options import RunOptions
from fptq_export.package.manifest import FileRecord, Manifest, StageRecord, write_manifest
from fptq_export.policy import LayerPolicy, Policy, Rule, write_policy
from fptq_export.verify.perplexity import PerplexityFigures
from fptq_export.verify.report import CacheFigures, DecodeFigures, LogitFigures, VerifyReport

BLOCKS = 30
CHANNELS = 64
HOSTILE = "<script>console.error('injected')</script>|\"&'`*[x](y)"
"""Text from outside that is none of ours."""
LARGE, EQUALIZED = 60.0, 1.0
"""Range of down_proj's input, and what equalization leaves of it."""
REQUIRED = ("summary", "warnings", "policy", "ranges", "layer-error", "cost", "accuracy", "proof", "calibration")
SECTIONS = (*REQUIRED, "environment", "command")


def write_run(
    directory: Path, *, model: str = "models/tiny", command: str = "fptq-export tiny", **changes: Any
) -> Path:
    """A run of 30 blocks with verify, eval and auto documents and an engine."""
    directory.mkdir(parents=True, exist_ok=True)
    policy, arrays = policy_of_blocks(changes.pop("hostile_name", None))
    write_policy(policy, arrays, directory / "policy.json")
    write_json_model(verify_report(), directory / "verify.json")
    write_json_model(eval_report(), directory / "eval.json")
    write_auto_report(auto_report(), directory / "auto.json")
    write_json_model(debug_report(policy), directory / "debug.json")
    options = RunOptions(model=model, output=directory, engine=directory / "out.plan", **changes)
    write_manifest(manifest(options, command, directory), directory)
    return directory


def policy_of_blocks(hostile_name: str | None = None) -> tuple[Policy, Mapping[str, NDArray[Any]]]:
    """Static q_proj and per-token o_proj in each block, equalized down_proj, a float head."""
    layers: dict[str, LayerPolicy] = {}
    arrays: dict[str, NDArray[Any]] = {}
    for block in range(BLOCKS):
        for name, tier, absmax in (
            ("self_attn.q_proj", "static", 4.0 + block / 10),
            ("self_attn.o_proj", "per_token", 300.0 + block),
            ("mlp.down_proj", "lae_static", LARGE),
        ):
            path = f"model.layers.{block}.{name}"
            after = EQUALIZED if tier == "lae_static" else absmax
            layers[path] = LayerPolicy(
                precision="w4a8",
                activation=tier,  # type: ignore[arg-type]
                reason=f"max|x| {absmax:g}",
                in_features=CHANNELS,
                out_features=CHANNELS,
                input_absmax=absmax,
                activation_scale=None if tier == "per_token" else after / 127,
                group_size=64,
                weight_method="rtn",
                site=f"{path}.site" if tier == "lae_static" else None,
            )
            maxima = np.linspace(absmax / CHANNELS, absmax, CHANNELS, dtype=np.float32)
            arrays[f"{path}.input_absmax"] = maxima
            if tier == "lae_static":
                arrays[f"{path}.site.equalization"] = maxima / np.float32(EQUALIZED)
    head = hostile_name or "lm_head"
    layers[head] = LayerPolicy(
        precision="float", activation=None, reason=f"excluded by {head}", in_features=CHANNELS, out_features=512
    )
    return Policy(model="tiny", rule=Rule(), layers=layers), arrays


def verify_report(increase: float = 0.02) -> VerifyReport:
    """A language model whose perplexity rose by a share."""
    before = PerplexityFigures(nll_sum=1000.0, tokens=500, perplexity=7.389)
    after = PerplexityFigures(nll_sum=1000.0, tokens=500, perplexity=7.389 * (1 + increase))
    return VerifyReport(
        reference="torch fp32",
        candidate="model.w4a8.onnx",
        windows=1,
        window_tokens=501,
        vocabulary=512,
        reference_perplexity=before,
        candidate_perplexity=after,
        perplexity_increase=increase,
        logits=LogitFigures(tokens=501, cosine_mean=0.99, cosine_min=0.9, kl_mean=0.01, top1_agreement=0.95),
        decode=DecodeFigures(
            prompt_tokens=8, steps=1, reference_tokens=(1, 2), candidate_tokens=(1, 2), kl=(0.0, 0.0),
            top1_agreement=1.0, first_divergence=None,
        ),
        cache=CacheFigures(
            steps=1, max_abs_diff=0.1, rms_diff=0.1, logit_absmax=9.0, rounding="int8", layers=BLOCKS, bound=1.0,
            within_bound=True,
        ),
    )  # fmt: skip


def eval_report() -> EvalReport:
    """Two systems on a text and a task."""
    figures = PerplexityFigures(nll_sum=1000.0, tokens=500, perplexity=7.389)
    accuracy: dict[System, MetricFigures] = {
        "float": MetricFigures(value=0.7, stderr=0.1),
        "onnx": MetricFigures(value=0.65, stderr=None),
    }
    record: dict[str, Any] = {"runs": "here", "seconds": 1.0, "peak_memory_bytes": 1 << 30}
    return EvalReport(
        tool_version="0.1.0",
        command="fptq-export eval run",
        environment={},
        model="tiny",
        max_length=512,
        seed=0,
        limit=None,
        systems=(SystemRecord(system="float", files={}, **record), SystemRecord(system="onnx", files={}, **record)),
        texts=(
            TextResult(
                source="mine.txt", description="mine.txt: 1 x 501 tokens", sha256="0", windows=1, window_tokens=501,
                perplexity={"float": figures, "onnx": figures},
            ),
        ),
        tasks=(
            TaskResult(
                task="piqa", is_group=False, version="1", num_fewshot=0, documents=20,
                metrics=(
                    MetricResult(
                        metric="acc", filter="none", higher_is_better=True, figures=accuracy,
                    ),
                ),
            ),
        ),
    )  # fmt: skip


BAD_LAYER = "model.layers.17.mlp.down_proj"


def debug_report(policy: Policy) -> DebugReport:
    """Every quantized layer, one of them with a fault."""
    fault = Fault(kind="activation_scale", message="its scale is ten times too small")
    layers = {
        path: LayerReport(
            block=int(path.split(".")[2]), runs=layer.runs, weight_sqnr_db=20.0,
            fp_inputs=Match(sqnr_db=18.0, cosine=0.99),
            predicted_sqnr_db=18.0, accumulated=Match(sqnr_db=12.0, cosine=0.9), input=None, input_is_wrong=False,
            saturated=0.01, input_absmax=1.0, input_limit=1.0, leave_one_out=None,
            faults=(fault,) if path == BAD_LAYER else (),
        )
        for path, layer in policy.quantized().items()
    }  # fmt: skip
    figures = PerplexityFigures(nll_sum=1000.0, tokens=500, perplexity=7.389)
    return DebugReport(
        tool_version="0.1.0", command="fptq-export debug run", environment={}, model="tiny", text="held out",
        text_sha256="0", windows=1, window_tokens=501, max_excess_db=3.0, changed_files=(), float_perplexity=figures,
        graph_perplexity=figures, graph_kl=0.1, layers=layers, bad_layers=(BAD_LAYER,), seconds=1.0,
        peak_memory_bytes=1 << 30,
    )  # fmt: skip


def auto_report() -> AutoReport:
    """Three budgets."""
    totals = PolicyTotals(effective_bits=4.5, decode_us=90.0, dynamic_layers=3, predicted_kl=0.02)
    points = tuple(
        ParetoPoint(effective_bits=bits, decode_us=80.0 + bits, predicted_kl=0.1 / bits, predicted_perplexity_ratio=1.1)
        for bits in (4.2, 4.6, 5.4)
    )
    return AutoReport(
        effective_bits=4.5, max_kl=None, max_dynamic_layers=None, cost="modelled, RTX 4090", kept="auto",
        auto=totals, paper=totals.model_copy(update={"predicted_kl": 0.03}), pareto=points,
    )  # fmt: skip


def manifest(options: RunOptions, command: str, directory: Path) -> Manifest:
    """All stages done; policy.json is recorded as it lies there."""
    written = FileRecord(
        path="policy.json", bytes=(directory / "policy.json").stat().st_size, modified_ns=0, sha256="0"
    )
    stages = {
        "trace": _stage([_file("model.onnx.data", 4 << 20)], {}),
        "calibrate": _stage([], {"data": "builtin: 2 x 64 tokens", "tokens": 128}),
        "policy": _stage([written], {}),
        "rewrite": _stage([_file("model.w4a8.onnx.data", 1 << 20)], {}),
        "build": _stage([_file("out.plan", 2 << 20)], BUILT),
    }
    return Manifest(tool_version="0.1.0", command=command, options=options, environment={"python": "3"}, stages=stages)


BUILT: Mapping[str, Any] = {
    "target": "tensorrt-rtx", "library_version": "1.7", "engine_layers": 99, "quantized_linears": 3 * BLOCKS,
    "unfused": [], "plugin_layers": 0, "plugin_linears": 0, "warnings": ["be careful."],
}  # fmt: skip


def _stage(outputs: list[FileRecord], summary: Mapping[str, Any]) -> StageRecord:
    return StageRecord(
        key="0", inputs=(), outputs=tuple(outputs), seconds=1.0, peak_memory_bytes=1 << 30, summary=dict(summary)
    )


def _file(name: str, count: int) -> FileRecord:
    """A file that `--no-keep` removed."""
    return FileRecord(path=name, bytes=count, modified_ns=0, sha256=name, removed=True)

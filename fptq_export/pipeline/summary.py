"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fptq_export.build.engine_facts import facts_from_summary
from fptq_export.package.manifest import FileRecord, Manifest
from fptq_export.pipeline.onnx_options import is_onnx_model
from fptq_export.pipeline.road import ROAD
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.tasks import is_half
from fptq_export.verify.encoder_report import EncoderReport, report_from_file
from fptq_export.verify.graph_report import GraphReport, OutputFigures
from fptq_export.verify.report import LARGE_INCREASE, VerifyReport

__all__ = ["accuracy_rows", "engine_rows", "policy_rows", "print_summary"]

_MIB = 1 << 20
_GIB = 1 << 30


def print_summary(manifest: Manifest, console: Console) -> None:
    """Print what a run produced: layers, sizes, accuracy, time and memory."""
    for table in (_result_table(manifest), _stage_table(manifest)):
        if table.row_count:
            console.print(table)
    if (hint := _accuracy_hint(manifest)) is not None:
        console.print(hint)
    engine = manifest.options.engine
    console.print(f"files: {manifest.options.output}" + (f"   engine: {engine}" if "build" in manifest.stages else ""))


def _result_table(manifest: Manifest) -> Table:
    half = f", {manifest.options.task}" if is_half(manifest.options.task) else ""
    table = Table(title=f"{Path(manifest.options.model).name}{half}: W4A8 by FPTQ", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    for label, value in (
        *policy_rows(manifest),
        *_form_rows(manifest),
        *_size_rows(manifest),
        *_accuracy_rows(manifest),
        *engine_rows(manifest),
    ):
        table.add_row(label, value)
    return table


def policy_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """What the layers run: label and value; empty where there is no policy yet."""
    record = manifest.stages.get("policy")
    if record is None:
        return []
    layers = record.summary["layers"]
    rows = [
        ("layers, INT8 static per tensor", str(layers["static"])),
        ("layers, equalized (LAE), then static", str(layers["lae_static"])),
        ("layers, INT8 dynamic per token", str(layers["per_token"])),
        ("layers left in float", str(record.summary["float_layers"])),
    ]
    equalized = record.summary.get("equalized_sites")
    if equalized:
        rows.append(("equalized fold sites", ", ".join(f"{count} {method}" for method, count in equalized.items())))
    names = {"w4a16": "INT4 weights, float inputs", "w8a8": "INT8 weights and inputs"}
    precisions = record.summary.get("precisions", {})
    rows += [(f"layers, {text}", str(precisions[name])) for name, text in names.items() if name in precisions]
    if (convolutions := record.summary.get("convolutions")) is not None:
        text = ", ".join(f"{count} {name}" for name, count in convolutions.items())
        rows.append(("convolutions", text))
    bits = record.summary["bits_per_weight"]
    if bits is not None:
        rows.append(("bits per quantized weight, scales included", f"{bits:.3f}"))
    if (effective := record.summary.get("effective_bits")) is not None:
        rows.append(("bits per weight of all linears, 16 where float", f"{effective:.3f}"))
    return rows + _outside_rows(manifest)


def _outside_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """Of the language half of a model that sees: what stays in torch, and what calibration did not see."""
    record = manifest.stages.get("trace")
    outside = record.summary.get("outside") if record is not None else None
    if not outside:
        return []
    return [
        ("not part of the graph, stays in float", ", ".join(outside)),
        ("calibrated and verified on", "embeddings of text, none of images"),
    ]


def _form_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """Of a static cache: how many attentions are one operator, and why the others are not."""
    record = manifest.stages.get("rewrite")
    fused = record.summary.get("fused") if record is not None else None
    if record is None or fused is None:
        return []
    left = record.summary["attention_left_alone"]
    reasons = "; ".join(dict.fromkeys(left.values()))
    text = f"{fused['Attention']}, {len(left)} as traced: {reasons}" if left else str(fused["Attention"])
    return [("static KV cache, layers with one Attention", text)]


def _size_rows(manifest: Manifest) -> list[tuple[str, str]]:
    directory = RunDirectory(manifest.options.output)
    full = _bytes(manifest, "trace", (directory.model.name, f"{directory.model.name}.data"))
    small = _bytes(manifest, "rewrite", (directory.w4a8.name, f"{directory.w4a8.name}.data"))
    engine = _bytes(manifest, "build", (_last_name(manifest.options.engine),))
    rows = []
    if full:
        dtype = "" if is_onnx_model(manifest.options) else f" ({manifest.options.dtype})"
        rows.append((f"model.onnx{dtype}", f"{full / _MIB:.1f} MiB"))
    if full and small:
        rows.append(("model.w4a8.onnx", f"{small / _MIB:.1f} MiB ({small / full:.2f} x)"))
    if full and engine:
        rows.append(("engine", f"{engine / _MIB:.1f} MiB ({engine / full:.2f} x)"))
    return rows


def _accuracy_rows(manifest: Manifest) -> list[tuple[str, str]]:
    path = RunDirectory(manifest.options.output).verify
    return accuracy_rows(report_from_file(path)) if "verify" in manifest.stages and path.is_file() else []


def _accuracy_hint(manifest: Manifest) -> str | None:
    """The way to better weights, for who took the paper's and lost much."""
    path = RunDirectory(manifest.options.output).verify
    if "verify" not in manifest.stages or manifest.options.weight_method != "rtn" or not path.is_file():
        return None
    report = report_from_file(path)
    if not isinstance(report, VerifyReport) or report.perplexity_increase <= LARGE_INCREASE:
        return None
    increase = f"perplexity rose by {report.perplexity_increase:.1%}"
    return f"{increase}; --preset balanced takes longer and makes better INT4 weights"


def accuracy_rows(report: VerifyReport | EncoderReport | GraphReport) -> list[tuple[str, str]]:
    """What verification measured: label and value."""
    if isinstance(report, EncoderReport):
        return _encoder_rows(report)
    if isinstance(report, GraphReport):
        return [_output_row(report, found) for found in report.outputs]
    before, after = report.reference_perplexity.perplexity, report.candidate_perplexity.perplexity
    text = f"{report.windows} x {report.window_tokens} tokens"
    return [
        (f"perplexity, FP32 ({text})", f"{before:.2f}"),
        ("perplexity, W4A8 in ONNX Runtime", f"{after:.2f} ({after / before:.3f} x)"),
        ("logits: cosine, mean", f"{report.logits.cosine_mean:.4f}"),
        ("logits: KL(FP32 || W4A8), nats", f"{report.logits.kl_mean:.4f}"),
        ("same top token", f"{report.logits.top1_agreement:.1%}"),
        (f"same greedy token, {report.decode.steps} decode steps", f"{report.decode.top1_agreement:.1%}"),
    ]


def _encoder_rows(report: EncoderReport) -> list[tuple[str, str]]:
    hidden, embeddings, retrieval = report.hidden, report.embeddings, report.retrieval
    return [
        (f"hidden states of {hidden.vectors} tokens: cosine, mean", f"{hidden.mean:.4f} (least {hidden.min:.4f})"),
        (
            f"embeddings of {embeddings.vectors} texts: cosine, mean",
            f"{embeddings.mean:.4f} (least {embeddings.min:.4f})",
        ),
        ("same nearest text", f"{retrieval.top1_agreement:.1%}"),
        (f"same texts among the {retrieval.nearest} nearest", f"{retrieval.overlap:.1%}"),
    ]


def _output_row(report: GraphReport, found: OutputFigures) -> tuple[str, str]:
    label = f"output {found.name!r} on {report.data}{' (held out)' if report.held_out else ''}"
    if found.cosine is None:
        return f"{label}: equal", f"{found.equal:.1%}"
    sqnr = "exact" if found.sqnr_db is None else f"{found.sqnr_db:.1f} dB"
    return f"{label}: cosine, SQNR", f"{found.cosine:.4f}, {sqnr}"


def engine_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """What the layer list of the engine shows: label and value; empty where none was built."""
    record = manifest.stages.get("build")
    if record is None:
        return []
    figures = record.summary
    return [
        ("engine layers", str(figures["engine_layers"])),
        ("quantized linears found in the engine, as INT4", str(figures["quantized_linears"])),
        *([("linears found in the engine, as INT8", str(int8))] if (int8 := figures.get("int8_linears")) else []),
        ("of these unpacked in a layer of their own", str(len(figures["unfused"]))),
        ("of these run by the W4A8 plugin", _plugin_text(figures)),
        *([("plugin library", "in the engine")] if facts_from_summary(figures).carries_plugin else []),
        *_convolution_rows(figures),
        *_proof_rows(figures),
        ("built with", f"{figures['target']} {figures['library_version']}"),
    ]


def _convolution_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not (count := figures.get("int8_convolutions")):
        return []
    rows = [("quantized convolutions found in the engine, as INT8", str(count))]
    if in_float := figures["float_convolutions"]:
        rows.append(("of these multiplied in float (no INT8 kernel)", str(len(in_float))))
    return rows


def _proof_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`211 of 211 layers`, and how many of them are proven in part; manifests of before proofs have none."""
    if not (verdicts := figures.get("verdicts")):
        return []
    text = f"{verdicts.get('proven', 0)} of {sum(verdicts.values())} layers"
    words = {"partly": "in part", "float_arithmetic": "in float, for want of a kernel", "not_shown": "not shown"}
    parts = [text, *(f"{verdicts[name]} {words[name]}" for name in words if name in verdicts)]
    return [("precision proven of weights and activations (proof.json)", ", ".join(parts))]


def _plugin_text(figures: Mapping[str, Any]) -> str:
    """`210 in 120 layers`; 0 without the plugin, and in manifests of before there was one."""
    linears, layers = figures.get("plugin_linears", 0), figures.get("plugin_layers", 0)
    return f"{linears} in {layers} layers" if linears != layers else str(linears)


def _stage_table(manifest: Manifest) -> Table:
    table = Table("stage", title="time and peak memory", title_justify="left")
    table.add_column("seconds", justify="right")
    table.add_column("peak GiB", justify="right")
    for name, record in sorted(manifest.stages.items(), key=lambda item: ROAD.index(item[0])):
        table.add_row(name, f"{record.seconds:.1f}", f"{record.peak_memory_bytes / _GIB:.2f}")
    if table.row_count:
        seconds = sum(record.seconds for record in manifest.stages.values())
        peak = max(record.peak_memory_bytes for record in manifest.stages.values())
        table.add_section()
        table.add_row("all", f"{seconds:.1f}", f"{peak / _GIB:.2f}")
    return table


def _bytes(manifest: Manifest, stage: str, names: tuple[str, ...]) -> int:
    record = manifest.stages.get(stage)
    outputs: tuple[FileRecord, ...] = record.outputs if record is not None else ()
    return sum(file.bytes for file in outputs if Path(file.path).name in names)


def _last_name(path: Path | None) -> str:
    return path.name if path is not None else ""

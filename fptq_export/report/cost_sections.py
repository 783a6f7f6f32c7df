"""The section about size and speed: files, the budgets of `--policy auto`, modelled and measured decode times."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fptq_export.policy import LayerPolicy
from fptq_export.report.blocks import Block, Cell, Column, Missing, Section, Table, Text
from fptq_export.report.documents import RunDocuments
from fptq_export.report.numbers import MIB, integer, mib, number
from fptq_export.report.plots import Bars, Points, bar_plot, frontier_plot
from fptq_export.report.sizes import sizes_from_run
from fptq_export.roofline import DEVICES, Device, Shape
from fptq_export.roofline.decode import decode_s
from fptq_export.roofline.measured import CostTable

if TYPE_CHECKING:
    from calib.auto.report import AutoReport, ParetoPoint, PolicyTotals

__all__ = ["cost_section"]


def cost_section(documents: RunDocuments) -> Section:
    """Size, speed, and what other budgets would give."""
    return Section(
        "cost",
        "Size and speed",
        (*_size_blocks(documents), *_time_blocks(documents), *_pareto_blocks(documents)),
    )


def _size_blocks(documents: RunDocuments) -> Iterator[Block]:
    sizes = sizes_from_run(documents)
    named = [("model.onnx", sizes.model), ("model.w4a8.onnx", sizes.quantized), ("engine", sizes.engine)]
    found = [(name, count) for name, count in named if count]
    if not found:
        yield Missing("No graph was written yet.", documents.command_from_model("run"))
        return
    columns = (Column("file"), Column("bytes", numeric=True), Column("size"), Column("of model.onnx", numeric=True))
    rows = tuple(
        (
            Cell(name),
            integer(count),
            Cell(mib(count)),
            number(count / sizes.model if sizes.model else None, ".2f"),
        )
        for name, count in found
    )
    yield Table("table-sizes", "Files, with their weights", columns, rows)
    caption = "Size of each file with its weights, in MiB."
    bars = Bars("size", tuple(count / MIB for _, count in found))
    yield bar_plot([name for name, _ in found], (bars,), "size, MiB", "plot-sizes", caption)


def _time_blocks(documents: RunDocuments) -> Iterator[Block]:
    policy = documents.policy
    layers = [layer for layer in policy.layers.values() if _has_time(layer)] if policy is not None else []
    if not layers:
        yield Text("There are no linears whose time could be modelled.")
        return
    yield Text(
        f"Modelled, not measured: time of the {len(layers)} linears for one new token, each weight read once. The model"
        " is a roofline of the plugin's kernels (fptq_export/roofline); what stays in float, and 16-bit weights, count"
        " with a lower bound. Attention, norms and sampling are not counted."
    )
    rows = []
    for device in DEVICES:
        ours = 1e6 * sum(_seconds(layer, device) for layer in layers)
        float_us = 1e6 * sum(_float_seconds(layer, device) for layer in layers)
        rows.append((device.name, ours, float_us))
    columns = (
        Column("GPU"), Column("this policy, µs", numeric=True), Column("16-bit weights, bound, µs", numeric=True),
        Column("faster, times", numeric=True),
    )  # fmt: skip
    cells = tuple((Cell(name), number(ours), number(bound), number(bound / ours, ".2f")) for name, ours, bound in rows)
    yield Table("table-model-time", "Modelled time of all linears for one token", columns, cells)
    bars = (
        Bars("this policy (model)", tuple(ours for _, ours, _ in rows)),
        Bars("16-bit weights (bound)", tuple(bound for _, _, bound in rows)),
    )
    caption = "Modelled time of all linears for one token, in microseconds. No number here comes from a GPU."
    yield bar_plot([name for name, *_ in rows], bars, "time, µs for one token, modelled", "plot-times", caption)
    if documents.costs is not None:
        yield from _measured_blocks(documents.costs, layers)


def _has_time(layer: LayerPolicy) -> bool:
    return layer.precision in ("w8a8", "float") or layer.group_size is not None


def _seconds(layer: LayerPolicy, device: Device) -> float:
    shape = Shape(layer.out_features, layer.in_features)
    return decode_s(shape, layer.precision, layer.activation, layer.group_size, device)


def _float_seconds(layer: LayerPolicy, device: Device) -> float:
    return decode_s(Shape(layer.out_features, layer.in_features), "float", None, None, device)


def _measured_blocks(costs: CostTable, layers: Sequence[LayerPolicy]) -> Iterator[Block]:
    known = {
        (entry.precision, entry.activation, entry.group_size, entry.in_features, entry.out_features): entry.microseconds
        for entry in costs.entries
    }
    keys = [_cost_key(layer) for layer in layers]
    timed = [key for key in keys if key in known]
    words = f"Measured on {costs.device}: {sum(known[key] for key in timed):.4g} µs for {len(timed)} linears"
    missing = len(keys) - len(timed)
    yield Text(words + (f"; the table has no time of the other {missing}." if missing else ", all of them."))
    columns = (
        Column("precision"), Column("input"), Column("group size", numeric=True), Column("inputs", numeric=True),
        Column("outputs", numeric=True), Column("linears", numeric=True), Column("each, µs", numeric=True),
    )  # fmt: skip
    rows = tuple(
        (
            Cell(key[0]), Cell(key[1] or "float"), number(key[2], "d"), integer(key[3]), integer(key[4]),
            integer(timed.count(key)), number(known[key]),
        )
        for key in dict.fromkeys(timed)
    )  # fmt: skip
    yield Table("table-measured-time", f"Measured times for one token, {costs.device}", columns, rows)


def _cost_key(layer: LayerPolicy) -> tuple[str, str | None, int | None, int, int]:
    """Equalization costs nothing at run time, so its times are those of `static`."""
    tier = "static" if layer.activation == "lae_static" else layer.activation
    group = None if layer.precision == "w8a8" else layer.group_size
    return (layer.precision, tier, group, layer.in_features, layer.out_features)


def _pareto_blocks(documents: RunDocuments) -> Iterator[Block]:
    report = documents.auto
    if report is None:
        model, directory = documents.manifest.options.model, documents.directory
        text = "The policy was not chosen under a budget, so there is no frontier of size against accuracy."
        command = shlex.join(["fptq-export", model, "-o", f"{directory}-auto", "--policy", "auto"])
        yield Missing(text, command if documents.predicts_text else None)
        return
    yield Text(f"Chosen under a budget of bits; '{report.kept}' was kept. Decode times are those of: {report.cost}.")
    columns = (
        Column("policy"), Column("bits a weight", numeric=True), Column("decode, µs", numeric=True),
        Column("predicted KL, nats", numeric=True), Column("per-token layers", numeric=True),
    )  # fmt: skip
    chosen = [("auto", report.auto), ("paper", report.paper)]
    rows = [(Cell(name), *_pareto_cells(totals), integer(totals.dynamic_layers)) for name, totals in chosen]
    rows += [(Cell("other budget"), *_pareto_cells(point), Cell("–")) for point in report.pareto]
    yield Table("table-pareto", "What other budgets would give", columns, tuple(rows))
    caption = "Predicted KL divergence from the float model, in nats a token, against bits a weight and decode time."
    labels = ("bits a weight, scales included", "time of all linears for one token, µs", "predicted KL, nats a token")
    yield frontier_plot(_frontier(report, "effective_bits"), _frontier(report, "decode_us"), labels, caption)


def _pareto_cells(found: PolicyTotals | ParetoPoint) -> tuple[Cell, Cell, Cell]:
    return number(found.effective_bits, ".3f"), number(found.decode_us), number(found.predicted_kl)


def _frontier(report: AutoReport, name: str) -> list[Points]:
    line = Points(
        "best choice under each budget",
        tuple(getattr(point, name) for point in report.pareto),
        tuple(point.predicted_kl for point in report.pareto),
    )
    marks = [("auto", report.auto), ("paper", report.paper)]
    return [line, *(Points(label, (getattr(t, name),), (t.predicted_kl,), marked=True) for label, t in marks)]

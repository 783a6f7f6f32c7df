"""The sections about layers: the policy, the ranges of their inputs, and the error of each."""

from __future__ import annotations

from collections.abc import Iterator

from fptq_export.report.blocks import Block, Cell, Column, Missing, Section, Table, Text
from fptq_export.report.debug_blocks import debug_blocks
from fptq_export.report.documents import RunDocuments
from fptq_export.report.layers import LayerFigures, panels_from_layers
from fptq_export.report.numbers import integer, number
from fptq_export.report.plots import TIERS, range_plot, value_plot

__all__ = ["error_section", "policy_section", "ranges_section"]

_LOWEST = 10
"""Layers of a short list."""


def policy_section(documents: RunDocuments, layers: tuple[LayerFigures, ...]) -> Section:
    """What every layer runs, and why."""
    if documents.policy is None:
        blocks: tuple[Block, ...] = (_no_policy(documents),)
    else:
        rule = documents.policy.rule
        words = (
            f"The rule is '{rule.name}', equalizer '{rule.equalizer}': inputs up to v0 = {rule.v0:g} are quantized as"
            f" they are, those between it and v1 = {rule.v1:g} are equalized first where the graph allows it, larger"
            " ones are quantized token by token. Click on a heading to sort."
        )
        blocks = (Text(words), _policy_table(layers))
    return Section("policy", "Policy", blocks)


def _policy_table(layers: tuple[LayerFigures, ...]) -> Table:
    columns = (
        Column("#", numeric=True),
        Column("layer"),
        Column("in × out", numeric=True),
        Column("runs"),
        Column("max |x|", numeric=True),
        Column("equalized", numeric=True),
        Column("INT8 scale", numeric=True),
        Column("reason"),
    )
    rows = tuple(
        (
            integer(layer.number),
            Cell(layer.path),
            Cell(f"{layer.shape[0]} × {layer.shape[1]}", layer.shape[0] * layer.shape[1]) if layer.shape else Cell("–"),
            Cell(" ".join(word for word in (layer.runs, layer.weight_method) if word)),
            number(layer.before),
            number(layer.after),
            number(layer.scale, ".3g"),
            Cell(layer.reason),
        )
        for layer in layers
    )
    return Table("table-policy", "Every layer of the policy, with the reason for what it runs", columns, rows)


def ranges_section(documents: RunDocuments, layers: tuple[LayerFigures, ...]) -> Section:
    """Activation ranges before and after equalization."""
    policy = documents.policy
    measured = tuple(layer for layer in layers if layer.before)
    if policy is None or not measured:
        blocks: tuple[Block, ...] = (_no_policy(documents),)
    else:
        equalized = sum(layer.after is not None for layer in measured)
        words = (
            f"Calibration saw the input of {len(measured)} layers; {equalized} of them read an equalized input. An INT8"
            " scale divides a range into 127 steps on either side of zero: the larger the range, the coarser the step."
        )
        blocks = (Text(words), range_plot(panels_from_layers(measured, of_inputs=True), policy.rule.v0, policy.rule.v1))
    return Section("ranges", "Activation ranges", blocks)


def error_section(documents: RunDocuments, layers: tuple[LayerFigures, ...]) -> Section:
    """What quantization does to each layer: measured where that was done, else what the policy lets one see."""
    blocks: list[Block] = []
    if documents.debugged is not None:
        blocks += debug_blocks(documents.debugged, layers)
    else:
        command = documents.command("debug") if documents.predicts_text else None
        blocks.append(Missing("The error of each layer was not measured one by one in this run.", command))
    blocks += _sqnr_blocks(layers)
    blocks += _level_blocks(layers)
    return Section("layer-error", "Error of each layer", tuple(blocks))


def _sqnr_blocks(layers: tuple[LayerFigures, ...]) -> Iterator[Block]:
    found = tuple(layer for layer in layers if layer.sqnr_db is not None)
    values = {layer.path: layer.sqnr_db for layer in found if layer.sqnr_db is not None}
    if found:
        caption = (
            "Signal power over error power of each layer's output with this layer alone quantized, in dB, as"
            " --policy auto measured it on calibration inputs. Higher is better."
        )
        yield value_plot(panels_from_layers(found, of_inputs=False), values, "SQNR, dB", "plot-auto-sqnr", caption)


def _level_blocks(layers: tuple[LayerFigures, ...]) -> Iterator[Block]:
    found = tuple(layer for layer in layers if layer.levels)
    if not found:
        yield Text("The policy has no static INT8 input whose channels were recorded.")
        return
    values = {layer.path: layer.levels for layer in found if layer.levels}
    yield Text(
        "What the policy itself shows: one scale serves all channels of a static input, so a few large channels leave"
        " the others few of the 127 steps. Where the median channel reaches only a few steps, much of the input is"
        " rounded away."
    )
    caption = (
        "Largest INT8 step, of 127, that the median channel of each static input reaches in calibration."
        " Computed from the channel maxima and scales of the policy; it is no measurement of error."
    )
    yield value_plot(panels_from_layers(found, of_inputs=True), values, "INT8 steps of 127", "plot-levels", caption)
    lowest = sorted(found, key=lambda layer: layer.levels or 0.0)[:_LOWEST]
    columns = (
        Column("layer"), Column("input"), Column("INT8 steps of the median channel", numeric=True),
        Column("max |x|", numeric=True), Column("equalized", numeric=True),
    )  # fmt: skip
    rows = tuple(
        (
            Cell(layer.path),
            Cell(TIERS[layer.tier][0]),
            number(layer.levels, ".2f"),
            number(layer.before),
            number(layer.after),
        )
        for layer in lowest
    )
    yield Table("table-levels", "Static inputs that use the fewest steps", columns, rows)


def _no_policy(documents: RunDocuments) -> Missing:
    return Missing("The run has no policy.json with calibrated layers yet.", documents.command_from_model("calibrate"))

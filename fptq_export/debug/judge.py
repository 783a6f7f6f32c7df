"""What is measured of a layer, what its numerics predict, and when it is bad.

**Prediction.** Rounding to a step d is off by d^2 / 12 in the mean (Widrow), independently of everything else. So a
layer y = x W, quantized with group scales s and INT8 steps d_t, is expected to be off by

    sum_t |x_t|^2-weighted steps:   sum_i |x_i|^2 sum_o s(g(i), o)^2 / 12      for the weights,
    and                             sum_t d_t^2 / 12 |W|^2                    for the inputs,

in squared magnitude over all tokens t. d is the static scale, or max|x_t| / 127. Methods that look at inputs (GPTQ,
clipping) do better. Whatever saturates, is multiplied by a wrong scale or belongs to another weight does worse, and
`max_excess` dB worse is bad. The allowance covers what is not independent: rounding errors of one weight that meet
correlated inputs, and inputs that calibration did not see. In the 210 linears of SmolLM2 by round-to-nearest the error
is 5.0 dB below to 0.3 dB above the prediction; calibrating a tiny model on 128 tokens, with every channel equalized to
the same maximum, takes it to 3.7 dB. The default of 6 dB is four times the predicted error power.

**Input.** With every quantized linear of the block in float, and the float hidden states, a layer reads what it
reads in the float model, but for the rounding of the graph's type and of an INT8 cache. Less than `_INPUT_DB`, or one
channel that is off by a third of its size and by a tenth of the mean channel's, is bad: folds that do not cancel,
norms, attention.

**Overflow.** What the layer reads or writes is beyond the largest number of the graph's type, although it is finite in
the float model.

The first bad layer is the first one with a fault, in the order of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fptq_export.debug.figures import Real, decibels, match, power, sqnr_db
from fptq_export.debug.graph_linears import GraphLinear, GraphWeight
from fptq_export.debug.reference import FloatLinear
from fptq_export.debug.report import Fault, LayerReport, Match
from fptq_export.debug.weight_faults import FloatWeight, weight_faults
from fptq_export.numerics import INT8_MAX

__all__ = ["LayerRun", "judged"]

_INPUT_DB = 20.0
"""Of inputs behind float linears. FP16 gives 58 dB and more on SmolLM2, and an INT8 cache over 30 dB; a scale that does
not cancel, of 2 or more where it matters, leaves less than 6 dB."""
_CHANNEL_ERROR = 0.1
"""Error of one channel over its own power, in squares: 10 dB."""
_CHANNEL_SHARE = 0.01
"""The same over the mean power of a channel: a smaller one is rounding, where an INT8 cache has large channels too."""
_SATURATED = 0.05
"""Share of inputs beyond the static range that is a fault whatever it does to the output. On text that calibration did
not see it is below 1e-5 in all of SmolLM2, and 0.012 where 128 tokens were all of calibration; the 99.9 percentile
leaves 1e-3 there on purpose. A scale 10 times too small leaves two thirds of Gaussian inputs there."""
_BEYOND = 2.0
"""Inputs that reach so many times the static range are named as the reason of an error."""
_TOO_WIDE = 2.0
"""How many times the largest magnitude of calibration a static range may reach: each is one bit that is lost."""


@dataclass(frozen=True)
class LayerRun:
    """Everything that was run for one layer. Tensors of the graph are in its own scale, [rows, channels]."""

    linear: GraphLinear
    reference: FloatLinear
    folded: FloatWeight
    alone: NDArray[np.floating] | None
    """The graph's layer on the float model's input, [rows, out]; None where the input does not fit its type."""
    x: NDArray[np.floating]
    """What it reads in the graph."""
    y: NDArray[np.floating]
    """What it writes in the graph."""
    clean_x: NDArray[np.floating]
    """What it reads behind float linears."""
    calibrated_absmax: float | None
    """Largest magnitude of its input in calibration, in the graph's scale."""
    site: str | None
    """Fold site of its input, where that is equalized."""


def judged(
    run: LayerRun, weight: GraphWeight, block: int | None, max_excess: float, *, judge_input: bool
) -> LayerReport:
    """Measure one layer and list its faults, those that explain others first.

    Args:
        run: What was run.
        weight: Of the graph.
        block: For the report.
        max_excess: dB.
        judge_input: False where another input of the block is wrong, which this one may follow from.
    """
    x, y = run.reference.x / run.folded.input, run.reference.x @ run.folded.weight
    dequantized = weight.dequantized()
    scale = run.linear.activation_scale()
    found = Match(sqnr_db=None, cosine=None) if run.alone is None else match(y, _unfolded(run.alone, run))
    predicted = decibels(power(y), _predicted_noise(x, run, weight, dequantized, scale))
    same_rows = len(run.x) == len(x)
    reads = match(x, run.clean_x.astype(np.float32)) if same_rows else None
    wrong_input = list(_input_faults(run)) if same_rows and judge_input else []
    saturated = _saturated(run.x, scale)
    report = LayerReport(
        block=block,
        runs=run.linear.layer.runs,
        weight_sqnr_db=sqnr_db(run.folded.wanted, dequantized),
        fp_inputs=found,
        predicted_sqnr_db=predicted,
        accumulated=match(y, _unfolded(run.y, run)) if same_rows else None,
        input=reads,
        input_is_wrong=bool(wrong_input),
        saturated=saturated,
        input_absmax=float(np.abs(x).max(initial=0.0)),
        input_limit=None if scale is None else INT8_MAX * scale,
        leave_one_out=None,
        faults=(),
    )
    faults = [
        *_overflows(run, x, y),
        *weight_faults(weight, run.folded, run.site),
        *wrong_input,
        *_scale_faults(run, report, max_excess),
        *_error_faults(report, max_excess),
    ]
    return report.model_copy(update={"faults": tuple(faults)})


def _unfolded(y: NDArray[np.floating], run: LayerRun) -> Real:
    """A product of the graph in the scale of the float model."""
    return y.astype(np.float32) * run.folded.output


def _predicted_noise(x: Real, run: LayerRun, weight: GraphWeight, dequantized: Real, scale: float | None) -> float:
    """Expected squared error of the layer's output over all rows, in the scale of the float model."""
    of_rows = (np.square(weight.scales, dtype=np.float64) @ np.square(run.folded.output, dtype=np.float64)) / 12.0
    squares = np.square(x, dtype=np.float64).sum(axis=0)
    noise = float(squares.reshape(len(of_rows), -1).sum(axis=1) @ of_rows)
    if run.linear.layer.activation is not None:
        steps = np.full(len(x), scale) if scale is not None else np.abs(x).max(axis=1) / INT8_MAX
        noise += float(np.square(steps).sum()) / 12.0 * power(dequantized * run.folded.output)
    return noise


def _saturated(x: NDArray[np.floating], scale: float | None) -> float | None:
    """Share of inputs whose code would lie beyond 127; of those that are numbers."""
    if scale is None:
        return None
    return float((np.abs(x.astype(np.float32)) > (INT8_MAX + 0.5) * scale).mean())


def _overflows(run: LayerRun, x: Real, y: Real) -> Iterator[Fault]:
    dtype = run.linear.dtype
    largest = float(np.finfo(dtype.numpy()).max)
    products = np.abs(y / run.folded.output).max(initial=0.0)
    for name, reached, array in (("input", np.abs(x).max(initial=0.0), run.x), ("output", products, run.y)):
        if reached > largest:
            message = f"its {name} reaches {reached:,.0f} in FP32, and {dtype.name} ends at {largest:,.0f}"
            yield Fault(kind="overflow", message=message)
            return
        if not np.isfinite(array).all() and (name == "output" and np.isfinite(run.x).all()):
            yield Fault(kind="overflow", message=f"its {name} is not finite, and its input is")


def _input_faults(run: LayerRun) -> Iterator[Fault]:
    """What is wrong with the input of a layer behind float linears."""
    x, clean = run.reference.x / run.folded.input, run.clean_x.astype(np.float32)
    if not np.isfinite(clean).all():
        if np.abs(x).max(initial=0.0) <= np.finfo(run.linear.dtype.numpy()).max:
            message = "its input is not finite, also behind float linears: something before it overflows"
            yield Fault(kind="overflow", message=message)
        return
    errors, powers = (np.square(array, dtype=np.float64).sum(axis=0) for array in (clean - x, x))
    off = (errors > _CHANNEL_ERROR * powers) & (errors > _CHANNEL_SHARE * powers.mean())
    sqnr = decibels(float(powers.sum()), float(errors.sum()))
    if not off.any() and (sqnr is None or sqnr >= _INPUT_DB):
        return
    if run.site is not None:
        for name, other in (("is not divided by", run.reference.x), ("is divided twice by", x / run.folded.input)):
            if power(clean - other) < power(clean - x):
                yield Fault(kind="fold", message=f"its input {name} the scale of {run.site}")
                return
    found = f"{sqnr:.1f} dB, {int(off.sum())} channels off"
    yield Fault(kind="input", message=f"its input is wrong although all linears before it are in float ({found})")


def _scale_faults(run: LayerRun, report: LayerReport, max_excess: float) -> Iterator[Fault]:
    limit, saturated, seen = report.input_limit, report.saturated, run.calibrated_absmax
    if limit is None or saturated is None:
        return
    beyond = report.input_absmax > _BEYOND * limit and _excess(report) > max_excess
    if saturated > _SATURATED or beyond:
        reached = f"inputs reach {report.input_absmax:.3g}, the scale covers {limit:.3g}"
        calibrated = "" if seen is None else f", calibration saw {seen:.3g}"
        yield Fault(kind="activation_scale", message=f"{saturated:.1%} of its inputs saturate: {reached}{calibrated}")
    elif seen is not None and limit > _TOO_WIDE * seen:
        yield Fault(kind="activation_scale", message=f"the scale covers {limit:.3g}, calibration saw {seen:.3g}")


def _excess(report: LayerReport) -> float:
    """How many dB the error lies above the prediction; 0 where either is not known."""
    found, predicted = report.fp_inputs.sqnr_db, report.predicted_sqnr_db
    return 0.0 if found is None or predicted is None else predicted - found


def _error_faults(report: LayerReport, max_excess: float) -> Iterator[Fault]:
    if _excess(report) > max_excess:
        found, predicted = report.fp_inputs.sqnr_db, report.predicted_sqnr_db
        message = f"{found:.1f} dB on the float model's input, where rounding alone gives {predicted:.1f} dB"
        yield Fault(kind="error", message=message)

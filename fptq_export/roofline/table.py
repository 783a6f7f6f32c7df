"""The modelled times of LLaMA's linears as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fptq_export.roofline.devices import DEVICES, LAUNCH_S, Device
from fptq_export.roofline.instructions import Scheme
from fptq_export.roofline.model import Shape, bound_s, time_s, weight_bytes_of

__all__ = ["MODELS", "ROWS", "SCHEMES", "TABLE_FILE", "markdown"]

TABLE_FILE = Path(__file__).resolve().parents[2] / "plugins" / "ROOFLINE.md"
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
SCHEMES = (Scheme("group", 128), Scheme("group", 64), Scheme("two_level", 128), Scheme("per_channel"))
_HIDDEN: Mapping[str, tuple[int, int, int]] = {
    # hidden size, feed-forward size, channels of q, k and v together (70B: 8 key-value heads of 128)
    "7B": (4096, 11008, 12288),
    "13B": (5120, 13824, 15360),
    "70B": (8192, 28672, 10240),
}
MODELS: Mapping[str, Mapping[str, Shape]] = {
    model: {
        "qkv": Shape(qkv, hidden),
        "o": Shape(hidden, hidden),
        "gate+up": Shape(2 * feed_forward, hidden),
        "down": Shape(hidden, feed_forward),
    }
    for model, (hidden, feed_forward, qkv) in _HIDDEN.items()
}
"""The four linears of a LLaMA decoder layer, q, k, v and gate, up concatenated."""
_DETAILED = SCHEMES[0]

_HEAD = f"""# Modelled time of the W4A8 linear

**Modelled, not measured.** No number here comes from a GPU. Written by `python -m fptq_export.roofline`; the model and
what it leaves out are in `fptq_export/roofline/model.py`, the devices with the source of each number in `devices.py`,
the instruction counts, counted in the machine code, in `instructions.json`.

A cell is the time in microseconds, the share of the roofline, and what bounds it: `m` memory, `t` tensor cores, `i`
issue of instructions. The roofline is the larger of memory time and INT8 tensor-core time at data-sheet rates, and one
launch. A launch is taken as {LAUNCH_S * 1e6:.1f} us. 100 % means that nothing in this model stands in the way, not that
a device gets there.

FP16 and W8A8 in the ratios are such bounds, too, not implementations: real ones are slower.
"""


def markdown() -> str:
    """The whole document."""
    parts = [_HEAD]
    for device in DEVICES:
        parts.append(f"## {device.name}\n")
        parts.append(f"Each linear, {_name(_DETAILED)}:\n")
        parts.append(_table(["linear (n x k)", *map(_rows_head, ROWS)], _linear_rows(device)))
        parts.append("Speed of a decoder layer's four linears against the FP16 bound / the W8A8 bound:\n")
        parts.append(_table(["model, scheme", *map(_rows_head, ROWS)], _ratio_rows(device)))
    return "\n".join(parts)


def _linear_rows(device: Device) -> Iterator[list[str]]:
    for model, shapes in MODELS.items():
        for name, shape in shapes.items():
            yield [f"{model} {name} ({shape.n} x {shape.k})", *(_cell(shape, m, device) for m in ROWS)]


def _cell(shape: Shape, m: int, device: Device) -> str:
    time = time_s(shape, _DETAILED, m, device)
    ideal = bound_s(shape, m, device, weight_bytes=weight_bytes_of(_DETAILED, shape.k), activation_bytes=1)
    letter = {"memory": "m", "mma": "t", "issue": "i"}[time.bound]
    return f"{time.total * 1e6:.1f} {ideal / time.total:.0%} {letter}"


def _ratio_rows(device: Device) -> Iterator[list[str]]:
    for model, shapes in MODELS.items():
        for scheme in SCHEMES:
            cells = []
            for m in ROWS:
                ours = sum(time_s(shape, scheme, m, device).total for shape in shapes.values())
                fp16, w8a8 = (
                    sum(
                        bound_s(shape, m, device, weight_bytes=width, activation_bytes=width)
                        for shape in shapes.values()
                    )
                    for width in (2, 1)
                )
                cells.append(f"{fp16 / ours:.2f} / {w8a8 / ours:.2f}")
            yield [f"{model}, {_name(scheme)}", *cells]


def _name(scheme: Scheme) -> str:
    return f"{scheme.name.replace('_', ' ')} {scheme.group_size or ''}".rstrip()


def _rows_head(m: int) -> str:
    return f"M = {m}"


def _table(head: Sequence[str], rows: Iterator[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

"""The policy: what every linear of a model runs, and why.

`policy.json` is the half a person reads, edits and replays; `policy.safetensors` beside it holds the arrays. They are
the only files the PyTorch half (`calib`) and the ONNX half (`fptq_export`) share, with `sites.json`.

Arrays, by name:

| name | dtype, shape | what |
|---|---|---|
| `<layer>.weight_codes` | uint8 [out, in/2] | INT4 codes of the equalized weight, two a byte along `in` (`packing`) |
| `<layer>.weight_scales` | float16 [out, in/group_size] | group scales |
| `<layer>.weight_codes` | int8 [out, in] | `w8a8`: INT8 codes of the equalized weight |
| `<layer>.weight_scales` | float32 [out] | `w8a8`: channel scales; those of rows below 0.0078 are no normal float16 |
| `<convolution>.weight_codes` | int8, shape of the weight | INT8 codes |
| `<convolution>.weight_scales` | float32 [out] | channel scales |
| `<convolution>.input_absmax` | float32 [1] | largest magnitude of the input seen in calibration |
| `<layer>.input_absmax` | float32 [in] | largest magnitude of each input channel seen in calibration |
| `<site>.equalization` | float32 [channels] | s of every equalized fold site: x' = x / s |
| `<site>.input_rms` | float32 [channels] | root mean square of x, for sites whose s is computed from it |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from safetensors import SafetensorError, safe_open

from fptq_export.errors import UserError
from fptq_export.files import read_json_model, write_json_model
from fptq_export.tensor_writer import TensorSpec, tensor_writer

__all__ = [
    "GROUP_SIZES",
    "POLICY_SCHEMA_VERSION",
    "Activation",
    "ArrayStream",
    "CandidateFigures",
    "ConvolutionPolicy",
    "EqualizationMethod",
    "Equalizer",
    "LayerPolicy",
    "Policy",
    "PolicyArrays",
    "Precision",
    "SequentialCodes",
    "SiteEqualization",
    "WeightMethod",
    "arrays_path",
    "group_size_for",
    "mean_bits",
    "policy_json_schema",
    "read_policy",
    "write_policy",
]

POLICY_SCHEMA_VERSION: Final = 1
GROUP_SIZES = (128, 64, 32, 16)
"""Group sizes that TensorRT fuses into one weight-only GEMM and our kernels support, largest first."""

Activation = Literal["static", "lae_static", "per_token"]
Precision = Literal["w4a8", "w4a16", "w8a8", "float"]
WeightMethod = Literal["rtn", "mse", "clip", "gptq", "gptq+cd", "adaround", "two_level", "integer_scale", "given"]
"""`given`: codes and scales are those of a checkpoint that was quantized before; no option selects it."""
EqualizationMethod = Literal["lae", "smoothquant", "awq", "search"]
Equalizer = Literal["paper", "none", "lae", "smoothquant", "awq", "search"]
"""What equalizes fold sites: the FPTQ rule where it says `lae_static`, nothing, or one method at every site."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CandidateFigures(_Model):
    """What `--policy auto` found out about one way to run a linear."""

    precision: Precision
    activation: Activation | None
    group_size: PositiveInt | None
    sqnr_db: float | None
    """Output power over error power on real inputs, in dB; null where the output is exact or no input was seen."""
    predicted_kl: float = Field(ge=0.0)
    """KL divergence of the model's prediction in nats a token, with this linear alone quantized."""
    bits_per_weight: float
    decode_us: float
    """Modelled or measured microseconds for one token."""


class SequentialCodes(_Model):
    """How the codes of a layer were made with the inputs that quantized blocks give."""

    weight_method: WeightMethod
    group_size: PositiveInt
    signed_scales: bool
    reconstruction_steps: NonNegativeInt = 0
    """Steps of learned rounding against the output of the decoder block; 0 for none."""


def _is_none(value: object) -> bool:
    return value is None


class LayerPolicy(_Model):
    """What one linear runs.

    `precision` is `w4a8` (INT4 weights in groups, INT8 activations), `w4a16` (the same weights, float activations),
    `w8a8` (INT8 weights with one scale an output channel, INT8 activations) or `float`.

    `activation` is the tier of the FPTQ rule: `static` (INT8, one scale for the tensor), `lae_static` (logarithmic
    equalization folded into the producer, then the same), `per_token` (INT8, one scale for each token, computed at run
    time). Inputs of `w4a16` and `float` layers keep the precision of the graph: they have no activation entry.
    """

    precision: Precision
    activation: Activation | None
    reason: str
    """Why this layer runs this: the measured range and the rule, the refusal, or the pattern that excluded it."""
    in_features: PositiveInt
    out_features: PositiveInt
    input_absmax: float | None = Field(default=None, ge=0.0)
    """v, the largest magnitude of the input seen in calibration, before equalization."""
    activation_scale: PositiveFloat | None = None
    """INT8 scale of the (equalized) input; null for `per_token`, and null in an edited file means closed form."""
    group_size: PositiveInt | None = None
    weight_method: WeightMethod | None = None
    signed_scales: bool = False
    """Group scales may be negative, so that all 16 levels are used. Only the plugin runs such layers."""
    sequential: SequentialCodes | None = Field(default=None, exclude_if=_is_none)
    """Set where the codes were made block by block, from text; absent elsewhere. A replay keeps such codes as they are;
    without the entry it quantizes the layer anew."""
    site: str | None = None
    """Fold site of the input, from `sites.json`."""
    candidates: tuple[CandidateFigures, ...] = ()
    """What `auto` chose from; empty for the paper's rule."""

    @property
    def runs(self) -> str:
        """What the layer runs, in a few words: `w4a8 per_token g64`."""
        group = None if self.group_size is None else f"g{self.group_size}"
        return " ".join(word for word in (self.precision, self.activation, group) if word)

    @property
    def bits_per_weight(self) -> float | None:
        """A code and its share of a scale: 16 bits a group of INT4, 32 bits a row of INT8; None for `float` layers."""
        if self.precision == "w8a8":
            return 8.0 + 32.0 / self.in_features
        return None if self.group_size is None else 4.0 + 16.0 / self.group_size

    @property
    def effective_bits(self) -> float:
        """`bits_per_weight`, and 16 for `float` layers."""
        return 16.0 if self.bits_per_weight is None else self.bits_per_weight


class ConvolutionPolicy(_Model):
    """What one convolution runs: `w8a8` (INT8 weights with one scale an output channel, INT8 inputs) or `float`."""

    precision: Literal["w8a8", "float"]
    reason: str
    """Why."""
    weight_shape: tuple[PositiveInt, ...]
    """As in the graph; empty where the weight is computed and its shape is not known."""
    input_absmax: float | None = Field(default=None, ge=0.0)
    """Largest magnitude of the input seen in calibration."""
    activation_scale: PositiveFloat | None = None
    """INT8 scale of the input; null in an edited file means `input_absmax` / 127."""


class SiteEqualization(_Model):
    """How s of one fold site is computed, channel by channel; consumers then read x' = x / s.

    m is the largest magnitude of a channel, rms its root mean square, w the largest weight that multiplies it.

    | method | s |
    |---|---|
    | `lae` | m / log2(2 + m) |
    | `smoothquant` | m^alpha / w^(1 - alpha) |
    | `awq` | rms^ratio, normalised |
    | `search` | (m / log2(2 + m))^lae_exponent x rms^rms_exponent, normalised |
    """

    method: EqualizationMethod
    alpha: float | None = Field(default=None, ge=0.0, le=1.0)
    """`smoothquant` only."""
    ratio: float | None = Field(default=None, ge=0.0, le=1.0)
    """`awq` only."""
    lae_exponent: float | None = Field(default=None, ge=-2.0, le=2.0)
    """`search` only."""
    rms_exponent: float | None = Field(default=None, ge=-2.0, le=2.0)
    """`search` only."""
    reason: str = ""
    """Why these parameters."""

    @model_validator(mode="after")
    def _has_its_parameters(self) -> SiteEqualization:
        needed = _EQUALIZATION_PARAMETERS[self.method]
        for name in ("alpha", "ratio", "lae_exponent", "rms_exponent"):
            if (getattr(self, name) is not None) != (name in needed):
                raise ValueError(f"{self.method} {'needs' if name in needed else 'has no'} {name}")
        return self


_EQUALIZATION_PARAMETERS: Final[Mapping[str, tuple[str, ...]]] = {
    "lae": (),
    "smoothquant": ("alpha",),
    "awq": ("ratio",),
    "search": ("lae_exponent", "rms_exponent"),
}


class Rule(_Model):
    """The rule that chose the tiers, with its thresholds."""

    name: Literal["paper", "auto"] = "paper"
    equalizer: Equalizer = "paper"
    """`paper` equalizes (LAE) between v0 and v1; `none` and the others take the decision away from the thresholds."""
    v0: float = Field(default=15.0, ge=0.0)
    """Inputs up to this magnitude are quantized as they are."""
    v1: float = Field(default=150.0, ge=0.0)
    """Inputs from this magnitude on are quantized token by token."""


class Policy(_Model):
    """`policy.json`."""

    schema_version: Literal[1] = POLICY_SCHEMA_VERSION
    model: str
    """Name of the model the policy was made for."""
    rule: Rule
    layers: dict[str, LayerPolicy]
    equalization: dict[str, SiteEqualization] = Field(default_factory=dict)
    """Site id -> how it is equalized, whatever the tiers of its layers. Sites of `lae_static` layers need no entry."""
    convolutions: dict[str, ConvolutionPolicy] = Field(default_factory=dict, exclude_if=lambda found: not found)
    """Path -> what it runs, of graphs that the user gave."""
    outside: tuple[str, ...] = Field(default=(), exclude_if=lambda found: not found)
    """Torch paths of modules of the model that are no part of the graph and stay as they are: a vision tower."""

    def quantized(self) -> dict[str, LayerPolicy]:
        """The layers whose weights are integers, by torch path."""
        return {path: layer for path, layer in self.layers.items() if layer.precision != "float"}

    def quantized_convolutions(self) -> dict[str, ConvolutionPolicy]:
        """The convolutions whose weights are integers, by path."""
        return {path: entry for path, entry in self.convolutions.items() if entry.precision != "float"}

    def equalizations(self) -> dict[str, SiteEqualization]:
        """Every equalized fold site, by id: the table, and LAE where a layer is `lae_static`."""
        sites = [layer.site for layer in self.layers.values() if layer.activation == "lae_static" and layer.site]
        return {site: SiteEqualization(method="lae") for site in sites} | self.equalization

    def equalized_sites(self) -> tuple[str, ...]:
        """Ids of the fold sites whose producers are divided: those of `lae_static` layers first, in order of use."""
        return tuple(self.equalizations())


class PolicyArrays:
    """`policy.safetensors`: one array is read at a time, and nothing is kept."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(str(path), "no such file", "keep it beside policy.json, or calibrate again")
        self.path = path
        try:
            with safe_open(str(path), framework="np") as file:
                self._names = frozenset(file.keys())
        except SafetensorError as error:
            raise UserError(str(path), f"damaged ({error})", "restore it, or calibrate again") from None

    def __contains__(self, name: str) -> bool:
        """Whether an array of that name is stored."""
        return name in self._names

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        """One array.

        Args:
            name: Its name.
            shape: The shape it must have, where that is known.

        Raises:
            UserError: It is missing or has another shape; names the file and the array.
        """
        if name not in self._names:
            raise UserError(str(self.path), f"array {name!r} is missing", "calibrate again")
        # Opened anew: a file that stays open keeps the pages of every array that was read.
        with safe_open(str(self.path), framework="np") as file:
            array: NDArray[Any] = file.get_tensor(name)
        if shape is not None and array.shape != shape:
            cause = f"array {name!r} is {list(array.shape)}, but policy.json asks for {list(shape)}"
            raise UserError(str(self.path), cause, "give the edited policy to --policy, which computes its arrays")
        return array


def arrays_path(policy_path: Path) -> Path:
    """`policy.json` -> `policy.safetensors` beside it."""
    return policy_path.with_suffix(".safetensors")


def group_size_for(in_features: int, wanted: int) -> int | None:
    """The wanted group size if it divides the input channels, else the largest supported one below it that does."""
    for size in (wanted, *(size for size in GROUP_SIZES if size < wanted)):
        if in_features % size == 0:
            return size
    return None


def mean_bits(layers: Iterable[LayerPolicy]) -> float | None:
    """Bits a weight on average, scales included and 16 where float; None of no layer."""
    sized = [(layer.in_features * layer.out_features, layer.effective_bits) for layer in layers]
    return sum(count * bits for count, bits in sized) / sum(count for count, _ in sized) if sized else None


def read_policy(path: Path) -> Policy:
    """Read `policy.json`. Raises UserErrors naming every field that is wrong."""
    return read_json_model(path, Policy)


@dataclass(frozen=True)
class ArrayStream:
    """The arrays of a policy, computed one at a time as they are asked for."""

    specs: Mapping[str, TensorSpec]
    """Every array that will come."""
    arrays: Iterable[tuple[str, NDArray[Any]]]

    def read_all(self) -> dict[str, NDArray[Any]]:
        """All of them in memory."""
        return dict(self.arrays)


def write_policy(policy: Policy, arrays: ArrayStream | Mapping[str, NDArray[Any]], path: Path) -> None:
    """Write both halves; the readable one last, so that it never stands without its arrays."""
    if not isinstance(arrays, ArrayStream):
        specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
        arrays = ArrayStream(specs, arrays.items())
    with tensor_writer(arrays_path(path), arrays.specs) as writer:
        for name, array in arrays.arrays:
            writer.write(name, array)
    write_json_model(policy, path)


def policy_json_schema() -> dict[str, Any]:
    """JSON Schema of `policy.json`, for editors and validators."""
    return Policy.model_json_schema()

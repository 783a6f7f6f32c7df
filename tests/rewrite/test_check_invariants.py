from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from fptq_export.errors import PrecisionError
from fptq_export.graph_io import load_graph
from fptq_export.policy import LayerPolicy, Policy, Rule
from fptq_export.rewrite.check_invariants import CheckInvariants, interface_from_graph
from fptq_export.rewrite.fuse_w4a8_linears import FuseW4A8Linears
from fptq_export.sites import Sites
from tests.rewrite.conftest import Rewritten
from tests.support.graphs import by_type, constant, int4_constant, linear_numbers, qdq_linear

FLOAT16 = ir.DataType.FLOAT16
NUMBERS = linear_numbers()
SITES = Sites(linears=(), fold_sites=())


def _policy(**changes: Any) -> Policy:
    fields: dict[str, Any] = {
        "precision": "w4a8",
        "activation": "static",
        "reason": "test",
        "in_features": 64,
        "out_features": 8,
        "activation_scale": float(NUMBERS.x_scale),
        "group_size": 16,
    }
    return Policy(model="m", rule=Rule(), layers={"fc": LayerPolicy(**{**fields, **changes})})


def _model(activation: str = "static", *, fused: bool = False) -> ir.Model:
    model = qdq_linear(NUMBERS, FLOAT16, activation)
    if fused:
        FuseW4A8Linears()(model)
    return model


def _check(model: ir.Model, policy: Policy | None = None) -> None:
    CheckInvariants(interface_from_graph(_model()), SITES, policy or _policy())(model)


@pytest.mark.parametrize("fixture", ["llama_rewritten", "llama_rewritten_fp16", "opt_rewritten"])
@pytest.mark.parametrize("form", ["qdq", "w4a8"])
def test_rewritten_models_pass(request: pytest.FixtureRequest, fixture: str, form: str) -> None:
    """Both forms of every model hold all invariants, read back from disk."""
    rewritten: Rewritten = request.getfixturevalue(fixture)
    interface = interface_from_graph(load_graph(rewritten.traced.model))
    check = CheckInvariants(interface, rewritten.traced.sites, rewritten.policy)
    assert not check(load_graph(getattr(rewritten, form))).modified


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("activation", ["static", "per_token"])
def test_sound_linear_passes(activation: str, fused: bool) -> None:
    """The smallest sound graph has no fault in either form or tier."""
    scale = {} if activation == "static" else {"activation_scale": None}
    _check(_model(activation, fused=fused), _policy(activation=activation, **scale))


def _append(model: ir.Model, op_type: str, inputs: list[ir.Value | None], name: str) -> ir.Node:
    node = ir.Node("", op_type, inputs, name=name)
    model.graph.append(node)
    return node


def _rename_output(model: ir.Model) -> None:
    model.graph.outputs[0].name = "z"


def _retype_input(model: ir.Model) -> None:
    model.graph.inputs[0].dtype = ir.DataType.FLOAT


def _second_reader(model: ir.Model) -> None:
    node = _append(model, "DequantizeLinear", [*_weight(model).inputs[:2]], "again")
    model.graph.outputs.append(node.outputs[0])


def _weight(model: ir.Model) -> ir.Node:
    (use,) = model.graph.initializers["fc.weight_codes"].uses()
    return use.node


def _replace_codes(codes: ir.Value, model: ir.Model) -> None:
    _weight(model).replace_input_with(0, codes)


def _missing_codes(model: ir.Model) -> None:
    _replace_codes(int4_constant(model, "elsewhere", NUMBERS.codes.T), model)
    del model.graph.initializers["fc.weight_codes"]


def _float_codes(model: ir.Model) -> None:
    codes = model.graph.initializers["fc.weight_codes"]
    codes.const_value = ir.tensor(NUMBERS.codes.T.astype(np.int8), name=codes.name)
    codes.dtype = ir.DataType.INT8


def _transposed_codes(model: ir.Model) -> None:
    codes = model.graph.initializers["fc.weight_codes"]
    codes.shape = ir.Shape([8, 64])


def _coarser_scales(model: ir.Model) -> None:
    model.graph.initializers["fc.weight_scales"].shape = ir.Shape([2, 8])


def _stray_int4(model: ir.Model) -> None:
    codes = int4_constant(model, "other", NUMBERS.codes.T)
    node = _append(model, "DequantizeLinear", [codes, *_weight(model).inputs[1:2]], "stray")
    model.graph.outputs.append(node.outputs[0])


def _float_activation(model: ir.Model) -> None:
    by_type(model, "MatMul").replace_input_with(0, model.graph.inputs[0])


def _computed_scale(model: ir.Model) -> None:
    dequantize = next(node for node in model.graph if node.op_type == "DequantizeLinear" and len(node.inputs) == 3)
    scale = _append(model, "Abs", [dequantize.inputs[1]], "abs")
    dequantize.replace_input_with(1, scale.outputs[0])


FAULTS: dict[str, tuple[Callable[[ir.Model], object], str]] = {
    "output renamed": (_rename_output, "inputs or outputs changed"),
    "input of another type": (_retype_input, "inputs or outputs changed"),
    "name used twice": (lambda model: _append(model, "Relu", list(model.graph.inputs), "fc/MatMul"), "used twice"),
    "no name": (lambda model: setattr(by_type(model, "MatMul"), "name", None), "None is missing"),
    "dead node": (lambda model: _append(model, "Relu", list(model.graph.inputs), "dead"), "outputs of node 'dead'"),
    "dead initializer": (lambda model: constant(model, "dead", np.float32(1)), "nothing reads initializer 'dead'"),
    "codes missing": (_missing_codes, "'fc.weight_codes' is missing"),
    "codes of 8 bits": (_float_codes, "'fc.weight_codes' is INT8"),
    "codes transposed": (_transposed_codes, r"'fc.weight_codes' is \[8, 64\]"),
    "codes read twice": (_second_reader, "with 2 readers"),
    "scales of another group size": (_coarser_scales, r"'fc.weight_scales' is \[2, 8\].*not \[4, 8\]"),
    "INT4 of no linear": (_stray_int4, "'other' is INT4 but belongs to no quantized linear"),
    "float activation": (_float_activation, r"quantized \['not at all'\], not \['scale 0.02099"),
    "computed scale": (_computed_scale, r"quantized \['by no constant scale'\]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(fault: str) -> None:
    """One planted fault, one sentence about it."""
    model = _model()
    plant, message = FAULTS[fault]
    plant(model)
    with pytest.raises(PrecisionError, match=message):
        _check(model)


@pytest.mark.parametrize("fused", [False, True])
def test_other_tier_than_the_policys_is_found(fused: bool) -> None:
    """A layer that the policy has per token must not run static, and the reverse."""
    with pytest.raises(
        PrecisionError, match=r"fc: its activations are quantized \['scale 0.02099.*\], not \['per token'\]"
    ):
        _check(_model("static", fused=fused), _policy(activation="per_token", activation_scale=None))
    with pytest.raises(PrecisionError, match=r"\['per token'\], not \['scale 0.02099"):
        _check(_model("per_token", fused=fused))


@pytest.mark.parametrize("fused", [False, True])
def test_other_scale_than_the_policys_is_found(fused: bool) -> None:
    """One float32 step beside the policy's scale is another scale."""
    scale = float(np.nextafter(NUMBERS.x_scale, np.float32(1)))
    with pytest.raises(PrecisionError, match="its activations are quantized"):
        _check(_model(fused=fused), _policy(activation_scale=scale))


def test_all_faults_are_listed_at_once() -> None:
    """One run tells everything."""
    model = _model()
    _rename_output(model)
    _float_codes(model)
    constant(model, "dead", np.float32(1))
    with pytest.raises(PrecisionError) as error:
        _check(model)
    for message in ("inputs or outputs changed", "'fc.weight_codes' is INT8", "nothing reads initializer 'dead'"):
        assert message in str(error.value)

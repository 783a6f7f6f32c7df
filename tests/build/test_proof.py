"""The proof of both operands, from recorded layer lists: healthy engines are proven whole, planted faults are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fptq_export.build.engine_facts import EngineFacts
from fptq_export.build.int8_convolutions import Int8Convolution
from fptq_export.build.layer_list import EngineLayer, layers_from_log
from fptq_export.build.proof import Expected, Proof, ProofEntry, proof_from_layers
from fptq_export.policy import ConvolutionPolicy, LayerPolicy, Policy, Rule

CODES = 256 * 128
Q, K, V = "layer.q_proj", "layer.k_proj", "layer.v_proj"
FACTS = EngineFacts(target="tensorrt-rtx", library_version="1.7.1.116", compute_capabilities=("8.9",))


def linear(precision: str, activation: str | None = "static", **changes: Any) -> LayerPolicy:
    fields: dict[str, Any] = {"precision": precision, "reason": "asked for", "in_features": 256, "out_features": 128}
    if precision == "float":
        return LayerPolicy(**fields, activation=None)
    fields |= {"activation": activation, "weight_method": "rtn"}
    if activation == "static":
        fields |= {"activation_scale": 0.05, "input_absmax": 6.35}
    if precision != "w8a8":
        fields |= {"group_size": 64}
    return LayerPolicy(**(fields | changes))


def policy_of(layers: dict[str, LayerPolicy], convolutions: dict[str, ConvolutionPolicy] | None = None) -> Policy:
    return Policy(model="test", rule=Rule(), layers=layers, convolutions=convolutions or {})


def proven(layers: tuple[EngineLayer, ...], policy: Policy, expected: Expected) -> tuple[Proof, dict[str, ProofEntry]]:
    proof = proof_from_layers(layers, expected, policy, {}, source="log", policy_sha256="", engine=FACTS)
    return proof, {entry.layer: entry for entry in proof.layers}


def mixed(golden: Path, **changes: LayerPolicy) -> tuple[tuple[EngineLayer, ...], Policy, Expected]:
    """Q and k static, v per token, as `mixed.txt` was built."""
    layers = {Q: linear("w4a8"), K: linear("w4a8"), V: linear("w4a8", "per_token")} | changes
    return layers_from_log(golden / "mixed.txt"), policy_of(layers), Expected(int4=dict.fromkeys((Q, K, V), CODES))


def test_native_linears_are_proven_with_both_operands(golden: Path) -> None:
    """INT4 weights; activations rounded in the layer before, also where linears share it under another's name."""
    proof, entries = proven(*mixed(golden))
    assert proof.verdicts() == {"proven": 3}
    assert proof.problems == ()
    assert {entries[path].weights for path in (Q, K, V)} == {"INT4"}
    assert {entries[path].activation for path in (Q, K)} == {"INT8, static, rounded and multiplied in FP16"}
    assert entries[V].activation == "INT8, per token, rounded and multiplied in FP16"
    assert f"names {V}/Round" in entries[V].evidence[-1]
    assert "names layer.k_proj/QuantizeLinear" in entries[Q].evidence[-1]


def test_rounding_of_another_scale_is_no_evidence(golden: Path) -> None:
    """A linear whose scale differs cannot share its neighbour's rounding: its activations are not called proven."""
    layers, policy, expected = mixed(golden, **{Q: linear("w4a8", activation_scale=0.07)})
    _, entries = proven(layers, policy, expected)
    assert (entries[Q].verdict, entries[K].verdict) == ("partly", "proven")
    assert "no layer before it names a rounding" in entries[Q].evidence[-1]


def test_int8_linears_are_proven(golden: Path) -> None:
    """`w8a8`: the layer that holds the INT8 codes reads INT8."""
    policy = policy_of({Q: linear("w8a8"), K: linear("w8a8"), V: linear("w8a8", "per_token")})
    expected = Expected(int8=dict.fromkeys((Q, K, V), CODES))
    proof, entries = proven(layers_from_log(golden / "int8.txt"), policy, expected)
    assert proof.verdicts() == {"proven": 3}
    assert (entries[Q].weights, entries[Q].activation) == ("INT8", "INT8")


def test_weight_only_linears_read_float(golden: Path) -> None:
    """`w4a16`: INT4 weights, and the data type of what the product reads."""
    layers, policy, expected = mixed(golden, **{V: linear("w4a16", None)})
    _, entries = proven(layers, policy, expected)
    assert (entries[V].weights, entries[V].activation, entries[V].verdict) == ("INT4", "FP16", "proven")


def test_plugin_linears_are_proven(golden: Path) -> None:
    """The plugin's layer holds the INT4 codes and rounds its input itself, by token or with one scale."""
    static, per_token = "layer0", "layer1"
    size: dict[str, Any] = {"in_features": 192, "out_features": 200}
    policy = policy_of({static: linear("w4a8", **size), per_token: linear("w4a8", "per_token", **size)})
    operators = {static: "FptqW4A8GemmStatic", per_token: "FptqW4A8GemmPerToken"}
    expected = Expected(int4=dict.fromkeys(operators, 208 * 192), plugin=operators)
    proof, entries = proven(layers_from_log(golden / "plugin.txt"), policy, expected)
    assert proof.verdicts() == {"proven": 2}
    assert entries[static].activation == "INT8, static, in the plugin"
    assert entries[per_token].activation == "INT8, per token, in the plugin"


def test_convolutions_are_proven_and_the_transposed_one_is_told_apart(golden: Path) -> None:
    """INT8 by INT8, except where TensorRT has no kernel: the person learns that this one multiplies in float."""
    shapes: dict[str, tuple[int, ...]] = {
        "rgb": (16, 3, 3, 3),
        "depthwise": (16, 1, 3, 3),
        "left": (16, 16, 1, 1),
        "right": (8, 16, 1, 1),
    }
    shapes |= {"up": (24, 8, 2, 2), "volume": (8, 4, 3, 3, 3)}
    entries = {
        path: ConvolutionPolicy(precision="w8a8", reason="", weight_shape=shape, input_absmax=1.0)
        for path, shape in shapes.items()
    }
    convolutions = {path: Int8Convolution(shape, transposed=path == "up") for path, shape in shapes.items()}
    layers = layers_from_log(golden / "convolutions.txt")
    proof, found = proven(layers, policy_of({}, entries), Expected(convolutions=convolutions))
    assert proof.verdicts() == {"proven": 5, "float_arithmetic": 1}
    assert found["up"].verdict == "float_arithmetic"
    assert (found["rgb"].weights, found["rgb"].activation, found["rgb"].kind) == ("INT8", "INT8", "convolution")


def test_every_profile_is_evidence(golden: Path) -> None:
    """Each optimization profile has its own copy of a layer, and all of them are named."""
    layers, policy, expected = mixed(golden)
    _, entries = proven(layers * 2, policy, expected.model_copy(update={"profiles": 2}))
    assert sum("holds INT4" in text for text in entries[Q].evidence) == 2


def test_float_linears_show_their_type(golden: Path) -> None:
    """A linear that the policy leaves in float is matched too; one that no layer names is said to be not shown."""
    layers, policy, expected = mixed(golden, head=linear("float"), lost=linear("float"))
    half = replace(next(item for item in layers if item.int4_codes), name="head/MatMul_1", onnx_nodes=("head/MatMul",))
    constants = tuple(replace(item, datatype="Half") for item in half.constants)
    _, entries = proven((*layers, replace(half, constants=constants)), policy, expected)
    assert (entries["head"].weights, entries["head"].activation, entries["head"].verdict) == ("FP16", "FP16", "proven")
    assert entries["head"].engine_layers == ("head/MatMul_1",)
    assert entries["lost"].verdict == "not_shown"


@pytest.mark.parametrize(("datatype", "cause"), [("Half", "no layer holds its INT4 codes"), ("Int8", "INT4 codes")])
def test_widened_weight_fails(golden: Path, datatype: str, cause: str) -> None:
    """A weight that became FP16 or INT8 is `failed`, with the layer that runs it now; its neighbours stay proven."""
    layers, policy, expected = mixed(golden)
    layers = tuple(
        replace(item, constants=tuple(replace(tensor, datatype=datatype) for tensor in item.constants))
        if f"{V}/MatMul" in item.onnx_nodes
        else item
        for item in layers
    )
    proof, entries = proven(layers, policy, expected)
    assert entries[V].verdict == "failed"
    assert cause in " ".join(entries[V].evidence)
    assert (entries[Q].verdict, entries[K].verdict) == ("proven", "proven")
    assert any(V in problem for problem in proof.problems)


def test_forbidden_pattern_fails(golden: Path) -> None:
    """Block-INT4 weights unpacked for an INT8 GEMM, from an engine that TensorRT built without a warning."""
    policy = policy_of({Q: linear("w4a8"), K: linear("w4a8")})
    expected = Expected(int4=dict.fromkeys((Q, K), CODES))
    proof, entries = proven(layers_from_log(golden / "unpacked_to_int8.txt"), policy, expected)
    assert {entry.verdict for entry in entries.values()} == {"failed"}
    assert any("before their scales are applied" in problem for problem in proof.problems)


def test_entry_that_the_engine_was_not_built_for_fails(golden: Path) -> None:
    """A policy with a quantized layer more than the engine holds is another policy."""
    layers, policy, expected = mixed(golden, **{"layer.o_proj": linear("w4a8")})
    _, entries = proven(layers, policy, expected)
    assert entries["layer.o_proj"].verdict == "failed"

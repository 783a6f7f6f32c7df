"""Graphs with branches, a loop, an unknown operator and weights with several readers: nothing is corrupted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from fptq_export import numerics
from fptq_export.graph_io import load_graph, save_graph
from fptq_export.packing import int4_from_packed
from fptq_export.policy import Activation, Policy, PolicyArrays, Precision
from fptq_export.progress import NoProgress
from fptq_export.rewrite import RewritePaths, lower_for_tensorrt, rewrite
from fptq_export.sites import Sites
from fptq_export.trace.find_sites import sites_from_graph
from tests.support.policies import rtn_policy
from tests.support.traced import Traced, run

SIZE = 32
TEXT = f"""<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
g (float[B, {SIZE}] x, bool yes, float[{SIZE}] w, {", ".join(f"float[{SIZE}, {SIZE}] {name}" for name in "ABCD")})
=> (float[B, {SIZE}] a, float[B, {SIZE}] b, float[B, {SIZE}] chosen, float[T, B, {SIZE}] repeated)
<int64 times = {{2}}>
{{
  [norm] n = Mul(x, w)
  [fc] a = MatMul(n, A)
  [unknown] k = com.microsoft.Gelu(x)
  [behind] b = MatMul(k, B)
  [choose] chosen = If(yes) <
    then_branch = then () => (float[B, {SIZE}] t) {{ [twin] t = MatMul(x, A) }},
    else_branch = otherwise () => (float[B, {SIZE}] e) {{ [inside] e = MatMul(x, C) }}
  >
  [repeat] repeated = Loop(times, yes) <
    body = body (int64 i, bool go) => (bool on, float[B, {SIZE}] s) {{ on = Identity(go) [looped] s = MatMul(x, D) }}
  >
}}"""
"""`fc` has a fold site, and its weight a second reader in a branch; `behind` reads a value without type and shape."""
OPERATORS = {"static": "FptqW4A8GemmStatic", "per_token": "FptqW4A8GemmPerToken"}
FLOAT32_SUM = (SIZE + 3) * 2.0**-24
"""Relative to the sum of the magnitudes: as many products added in any order, the two scales and the result rounded."""


@dataclass(frozen=True)
class Written:
    """What the rewrites made of the graph."""

    traced: Traced
    policy: Policy
    arrays: PolicyArrays
    qdq: Path
    w4a8: Path

    @property
    def sites(self) -> Sites:
        """What was found."""
        return self.traced.sites


def _graph(text: str = TEXT) -> ir.Model:
    """The graph with random weights; each MatMul says that it belongs to the module it is called after."""
    model = ir.from_proto(onnx.parser.parse_model(text))
    random = np.random.default_rng(0)
    for value in [value for value in model.graph.inputs if value.name not in ("x", "yes")]:
        model.graph.inputs.remove(value)
        array = random.normal(size=[int(str(dim)) for dim in value.shape or ()]).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props["pkg.torch.onnx.name_scopes"] = repr(["", "wrapped", f"wrapped.{node.name}", "n"])
    return model


def _sites(model: ir.Model) -> Sites:
    return sites_from_graph(model, dict.fromkeys(("fc", "behind", "twin", "inside", "looped"), (SIZE, SIZE)))


def _feed(yes: bool = True) -> dict[str, NDArray[Any]]:
    return {"x": np.random.default_rng(1).normal(size=(3, SIZE)).astype(np.float32), "yes": np.array(yes)}


def _written(
    directory: Path,
    tiers: Mapping[str, Activation],
    precisions: Mapping[str, Precision] | None = None,
    model: ir.Model | None = None,
) -> Written:
    """Quantize some linears, with the range of a normal distribution for every channel."""
    model = model if model is not None else _graph()
    sites = _sites(model)
    path = directory / "model.onnx"
    save_graph(model, path)
    traced = Traced(path, sites, directory, "fp32")
    absmax = {linear.path: np.full(SIZE, 3.0, np.float32) for linear in sites.linears}
    policy, arrays = rtn_policy(traced, directory / "policy.json", tiers, absmax, group_size=16, precisions=precisions)
    paths = RewritePaths(path, directory / "model.qdq.onnx", directory / "model.w4a8.onnx")
    rewrite(paths, sites, policy, arrays, NoProgress())
    return Written(traced, policy, arrays, paths.qdq, paths.w4a8)


def test_linears_of_branches_and_loops_are_named() -> None:
    """No MatMul of theirs is taken for one that always runs, once; the reason names the node that holds it."""
    sites = _sites(_graph())
    reasons = {linear.path: linear.reason for linear in sites.unmatched}
    assert [linear.path for linear in sites.linears] == ["fc", "behind"]
    assert reasons == {
        "twin": "the graph computes it inside If node 'choose'",
        "inside": "the graph computes it inside If node 'choose'",
        "looped": "the graph computes it inside Loop node 'repeat'",
    }


@pytest.mark.parametrize("yes", [True, False], ids=["then", "else"])
def test_branches_and_loops_compute_what_they_did(yes: bool, tmp_path: Path) -> None:
    """Everything else is quantized and folded, with a weight that a branch reads too: no bit of their outputs moves."""
    written = _written(tmp_path, {"fc": "lae_static", "behind": "per_token"})
    outputs = ("chosen", "repeated", "a")
    before, *after = (
        run(path, _feed(yes), outputs=outputs) for path in (written.traced.model, written.qdq, written.w4a8)
    )
    for given in after:
        for name in outputs[:2]:
            np.testing.assert_array_equal(given[name], before[name])
        assert (given["a"] != before["a"]).any(), "nothing was quantized"


def test_weight_that_a_branch_reads_too_is_cloned_when_its_site_is_folded(tmp_path: Path) -> None:
    """Codes are those of the equalized weight, and the float weight stays for the branch, bit for bit."""
    written = _written(tmp_path, {"fc": "lae_static"})
    stored = [load_graph(path).graph.initializers for path in (written.traced.model, written.qdq)]
    before, after = (initializers["A"].const_value for initializers in stored)
    assert before is not None
    assert after is not None
    np.testing.assert_array_equal(after.numpy(), before.numpy())
    assert {"fc.weight_codes", "A"} <= stored[1].keys()
    assert "fc.equalized_weight" not in stored[1]


@pytest.mark.parametrize(
    ("tier", "precision"), [("static", "w4a8"), ("per_token", "w4a8"), ("static", "w8a8"), ("per_token", "w8a8")]
)
def test_linear_behind_an_operator_without_shapes_is_quantized(
    tier: Activation, precision: Precision, tmp_path: Path
) -> None:
    """The graph does not say what a custom operator gives: its type is the weight's, the numbers are the contract's."""
    assert _sites(_graph()).linear("behind").no_site_reason == (
        "no per-channel producer to fold into: the input comes from Gelu node 'unknown'"
    )
    written = _written(tmp_path, {"behind": tier}, {"behind": precision})
    fused = {node.op_type for node in load_graph(written.w4a8).graph if node.domain == "fptq"}
    assert fused == ({OPERATORS[tier]} if precision == "w4a8" else set())
    given = run(written.w4a8, _feed(), outputs=("b",))["b"]
    layer = written.policy.layers["behind"]
    x = _gelu(_feed()["x"])
    static = None if layer.activation_scale is None else np.float32(layer.activation_scale)
    scale = numerics.per_token_scale(x) if static is None else static
    codes, steps = (written.arrays.read(f"behind.weight_{part}") for part in ("codes", "scales"))
    x_codes = numerics.quantize_activation(x, scale)

    def contract(x: NDArray[np.integer], w: NDArray[np.integer]) -> NDArray[np.float64]:
        if precision == "w4a8":
            return numerics.w4a8_linear(x, scale, w, steps, 16)
        return numerics.w8a8_linear(x, scale, w, steps)

    w_codes = int4_from_packed(codes) if precision == "w4a8" else codes
    allowed = FLOAT32_SUM * contract(np.abs(x_codes), np.abs(w_codes.astype(np.int64))).max()
    np.testing.assert_allclose(given, contract(x_codes, w_codes), rtol=0.0, atol=allowed)


def _gelu(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """As ONNX Runtime computes it: the codes must be the same integers."""
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["com.microsoft" : 1]> g (float[B, N] x) => (float[B, N] y)'
        " { y = com.microsoft.Gelu(x) }"
    )
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(["y"], {"x": x})[0]
    return result


def test_graph_with_names_that_are_there_twice_is_rewritten(tmp_path: Path) -> None:
    """A node that is called like a linear's MatMul, and two of one name: the linear is quantized, and nothing else."""
    model = _graph()
    nodes = {node.name: node for node in model.graph}
    nodes["choose"].name = "behind/MatMul"
    nodes["norm"].name = nodes["unknown"].name = "same"
    written = _written(tmp_path, {"behind": "static"}, model=model)
    graph = load_graph(written.w4a8).graph
    names = [node.name for node in ir.traversal.RecursiveGraphIterator(graph)]
    assert len(set(names)) == len(names)
    assert {node.op_type for node in graph if node.domain == "fptq"} == {"FptqW4A8GemmStatic"}
    before, after = (run(path, _feed(), outputs=("a", "chosen")) for path in (written.traced.model, written.w4a8))
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_names_of_a_branch_are_not_given_again(tmp_path: Path) -> None:
    """A node of a branch that is called like one of ours keeps its name; ours gets another."""
    model = _graph()
    inner = next(node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.name == "inside")
    inner.name = "behind/DequantizeLinear"
    written = _written(tmp_path, {"behind": "static"}, model=model)
    lower_for_tensorrt(written.w4a8, tmp_path / "lowered.onnx")
    for path in (written.qdq, tmp_path / "lowered.onnx"):
        nodes = list(ir.traversal.RecursiveGraphIterator(load_graph(path).graph))
        assert len({node.name for node in nodes}) == len(nodes)
        assert [node.op_type for node in nodes if node.name == "behind/DequantizeLinear"] == ["MatMul"]

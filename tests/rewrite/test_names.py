from __future__ import annotations

import onnx_ir as ir
from hypothesis import given
from hypothesis import strategies as st

from fptq_export.rewrite.names import UniqueNames

OPS = st.sampled_from(["MatMul", "Cast", "MatMul_1", "QuantizeLinear"])
OWNERS = st.sampled_from(["fc", "fc/MatMul", "model.layers.0.mlp"])


@given(taken=st.lists(st.tuples(OWNERS, OPS), max_size=6), new=st.lists(st.tuples(OWNERS, OPS), max_size=12))
def test_names_are_unique_and_readable(taken: list[tuple[str, str]], new: list[tuple[str, str]]) -> None:
    """Whatever is there already, each new node gets a name nobody has, which starts with `<owner>/<OpType>`."""
    x = ir.Value(name="x")
    there = [ir.Node("", op, [x], name=f"{owner}/{op}") for owner, op in dict.fromkeys(taken)]
    model = ir.Model(ir.Graph([x], [], nodes=there, name="g", opset_imports={"": 21}), ir_version=10)
    names = UniqueNames(model)
    nodes = []
    for owner, op in new:
        node = ir.Node("", op, [x])
        names.name_nodes([node], owner)
        assert (node.name or "").startswith(f"{owner}/{op}")
        assert node.outputs[0].name == f"{node.name}.output"
        nodes.append(node)
    given_out = [node.name for node in (*there, *nodes)]
    assert len(given_out) == len(set(given_out))


def test_outputs_of_the_graph_keep_their_names() -> None:
    """Callers read `logits`, whatever the node that makes it is called."""
    x = ir.Value(name="x")
    node = ir.Node("", "Relu", [x], name="old")
    node.outputs[0].name = "logits"
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], name="g", opset_imports={"": 21}), ir_version=10)
    UniqueNames(model).name_nodes([node], "head")
    assert (node.name, node.outputs[0].name) == ("head/Relu", "logits")

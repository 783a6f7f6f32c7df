"""Tied parameters of a traced graph become one initializer where the checkpoint holds one tensor."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from fptq_export.trace.share_tied_weights import share_tied_weights

KIND = "pkg.torch.export.graph_signature.InputSpec.kind"
TIED = {"embedding": "shared", "head": "shared"}


def _model(kind: str = "PARAMETER", head: str = "float[2, 2]") -> ir.Model:
    """Sum of an embedding and a head, without values."""
    zeros = "{0, 0}" if head == "float[1, 2]" else "{0, 0, 0, 0}"
    cast = "read = Cast<to = 1>(head)" if head.startswith("double") else "read = Identity(head)"
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] embedding = {{0, 0, 0, 0}}, {head} head = {zeros}>
        {{ {cast} y = Sum(x, embedding, read) }}"""
    )
    for value in model.graph.initializers.values():
        value.metadata_props[KIND] = kind
    return model


def _reader_of_head(model: ir.Model) -> str | None:
    node = next(node for node in model.graph if node.op_type in ("Identity", "Cast"))
    assert node.inputs[0] is not None
    return node.inputs[0].name


def test_what_the_checkpoint_holds_once_is_read_once() -> None:
    """Both names stand for a third one, which alone is in the file."""
    model = _model()
    assert share_tied_weights(model, {"shared"}, TIED)
    assert list(model.graph.initializers) == ["embedding"]
    assert _reader_of_head(model) == "embedding"


@pytest.mark.parametrize(
    ("stored", "tied", "kind", "head"),
    [
        ({"shared", "head"}, TIED, "PARAMETER", "float[2, 2]"),
        ({"embedding", "head"}, {}, "PARAMETER", "float[2, 2]"),
        ({"shared", "other"}, {"embedding": "shared", "head": "other"}, "PARAMETER", "float[2, 2]"),
        ({"shared"}, TIED, "BUFFER", "float[2, 2]"),
        ({"shared"}, TIED, "PARAMETER", "double[2, 2]"),
        ({"shared"}, TIED, "PARAMETER", "float[1, 2]"),
    ],
    ids=["a head of its own", "nothing tied", "tied to another", "no parameter", "other type", "other shape"],
)
def test_other_initializers_are_left_alone(stored: set[str], tied: dict[str, str], kind: str, head: str) -> None:
    """Each initializer keeps its readers."""
    model = _model(kind, head)
    assert not share_tied_weights(model, stored, tied)
    assert list(model.graph.initializers) == ["embedding", "head"]
    assert _reader_of_head(model) == "head"

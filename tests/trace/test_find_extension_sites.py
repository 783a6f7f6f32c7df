"""Sites beyond the rule's: found where division passes through exactly, and refused everywhere else."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from fptq_export.sites import FoldSite, Producer
from fptq_export.trace.find_extension_sites import extension_site
from tests.support.traced import Traced
from tests.trace.test_find_fold_sites import _linears

HEADS, VALUE_HEADS, HEAD_DIM = 4, 2, 2
CHANNELS, VALUES = HEADS * HEAD_DIM, VALUE_HEADS * HEAD_DIM


def _model(nodes: str, outputs: str) -> ir.Model:
    """A graph of u [1, 3, 8], probabilities p [1, 4, 3, 5] and a cache [1, 2, 2, 2], with inferred shapes."""
    matrices = {"P": (CHANNELS, CHANNELS), "V": (CHANNELS, VALUES), "O": (CHANNELS, 3), "M": (CHANNELS, CHANNELS)}
    constants = [
        f"float[{rows}, {columns}] {name} = {{{', '.join(['1'] * (rows * columns))}}}"
        for name, (rows, columns) in matrices.items()
    ]
    constants += [f"float[{size}] {name}b = {{{', '.join(['1'] * size)}}}" for name, size in (("P", 8), ("V", 4))]
    constants.append("float[2, 2] square = {1, 2, 3, 4}")
    shapes = {
        "split": "1, 3, 2, 2", "split4": "1, 3, 4, 2", "join": "1, 3, 8", "two": "2", "first": "1",
        "wide": "1, 2, 2, 5, 2", "heads": "1, 4, 5, 2", "short": "1, 2, 2, 3, 2", "headsshort": "1, 4, 3, 2",
    }  # fmt: skip
    constants += [f"int64[{len(dims.split(','))}] {name} = {{{dims}}}" for name, dims in shapes.items()]
    promised = ", ".join(f"float {name}" for name in outputs.split(", "))
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[1, 3, 8] u, float[1, 4, 3, 5] p, float[1, 4, 3, 3] q, float[1, 2, 2, 2] past) => ({promised})
        <{", ".join(constants)}> {{ {nodes} }}"""
    model = onnx.parser.parse_model(text)
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True))


def _found(nodes: str, outputs: str) -> FoldSite | None:
    model = _model(nodes, outputs)
    linears = _linears(model)
    readers = [linear for linear in linears.values() if linear.input.name == "x"]
    assert readers
    return extension_site(readers[0].input, readers, linears)


VALUE = "v = MatMul(u, V) "
SPLIT = "s = Reshape(v, split) n = Transpose<perm = [0, 2, 1, 3]>(s) "
CACHE = "present = Concat<axis = -2>(past, n) "
REPEAT = "e = Unsqueeze(present, two) w = Expand(e, wide) r = Reshape(w, heads) "
MIX = "m = MatMul(p, r) t = Transpose<perm = [0, 2, 1, 3]>(m) x = Reshape(t, join) y = MatMul(x, O)"
WHOLE = VALUE + SPLIT + CACHE + REPEAT + MIX
NO_CACHE = (
    VALUE + SPLIT + "e = Unsqueeze(n, two) w = Expand(e, short) r = Reshape(w, headsshort) " + MIX.replace("(p,", "(q,")
)
ALL_HEADS = "v = MatMul(u, P) s = Reshape(v, split4) r = Transpose<perm = [0, 2, 1, 3]>(s) " + MIX.replace("(p,", "(q,")


def test_grouped_query_attention_is_found() -> None:
    """Query heads 0, 1 read value head 0, and 2, 3 value head 1: s is tied accordingly."""
    site = _found(WHOLE, "y, present")
    assert site == FoldSite(
        id="V", kind="attention_value", channels=CHANNELS, producers=(Producer(initializer="V", axis=1),),
        producer_linear="V", consumers=("O",), repeats=2, head_dim=HEAD_DIM,
    )  # fmt: skip
    s = np.array([1, 5, 2, 4, 7, 1, 3, 6], np.float32)
    assert site.tied(s).tolist() == [2, 5, 2, 5, 7, 6, 7, 6]
    assert site.producer_scale(site.tied(s)).tolist() == [2, 5, 7, 6]


@pytest.mark.parametrize(
    ("nodes", "outputs", "repeats", "producers"),
    [
        (NO_CACHE, "y", 2, ["V"]),
        (ALL_HEADS, "y", 1, ["P"]),
        (WHOLE.replace("v = MatMul(u, V)", "l = MatMul(u, V) v = Add(l, Vb)"), "y, present", 2, ["V", "Vb"]),
    ],
    ids=["no cache", "a value head for each query head", "bias"],
)
def test_other_exact_forms_are_found(nodes: str, outputs: str, repeats: int, producers: list[str]) -> None:
    """Without a cache, without repetition, with a bias, which is divided too."""
    site = _found(nodes, outputs)
    assert site is not None
    assert (site.kind, site.repeats) == ("attention_value", repeats)
    assert [part.initializer for part in site.producers] == producers


@pytest.mark.parametrize("bias", [False, True])
def test_relu_is_found(bias: bool) -> None:
    """Relu passes positive factors through; the rows of the linear before it are the producer, and its bias."""
    before = "l = MatMul(u, P) h = Add(l, Pb)" if bias else "h = MatMul(u, P)"
    site = _found(f"{before} x = Relu(h) y = MatMul(x, O)", "y")
    assert site is not None
    assert (site.kind, site.producer_linear, site.channels) == ("relu_mlp", "P", CHANNELS)
    assert [part.initializer for part in site.producers] == (["P", "Pb"] if bias else ["P"])


RELU = "h = MatMul(u, P) x = Relu(h) y = MatMul(x, O)"
MUST_REFUSE = {
    "Relu read twice before": (RELU + " z = Neg(h)", "y, z"),
    "Relu output read elsewhere": (RELU + " z = Neg(x)", "y, z"),
    "Relu of a graph output": (RELU, "y, h"),
    "Relu of no linear": ("h = Neg(u) x = Relu(h) y = MatMul(x, O)", "y"),
    "Relu of a residual": ("l = MatMul(u, P) h = Add(l, u) x = Relu(h) y = MatMul(x, O)", "y"),
    "Sigmoid": (RELU.replace("Relu", "Sigmoid"), "y"),
    "squared Relu": ("h = MatMul(u, P) k = Relu(h) x = Mul(k, k) y = MatMul(x, O)", "y"),
    "weight before Relu used twice": (RELU + " z = MatMul(u, P)", "y, z"),
    "values read elsewhere": (WHOLE + " z = Neg(v)", "y, present, z"),
    "new values read elsewhere": (WHOLE + " z = Neg(n)", "y, present, z"),
    "cache read elsewhere": (WHOLE + " z = Neg(present)", "y, present, z"),
    "old cache read elsewhere": (WHOLE + " z = Neg(past)", "y, present, z"),
    "cache that does not leave": (WHOLE, "y"),
    "cache that does not enter": (WHOLE.replace(VALUE, VALUE + "old = Neg(past) ").replace("(past, n)", "(old, n)"),
                                  "y, present"),

    "values leave without a cache": (NO_CACHE, "y, n"),
    "repeated values read elsewhere": (WHOLE + " z = Neg(r)", "y, present, z"),
    "probabilities from values": (NO_CACHE.replace("m = MatMul(q, r)", "k = MatMul(q, r) m = MatMul(q, k)"), "y"),
    "value weight used twice": (WHOLE + " z = MatMul(u, V)", "y, present, z"),
    "heads tiled, not repeated": (NO_CACHE.replace("Unsqueeze(n, two)", "Unsqueeze(n, first)"), "y"),
    "attention over channels": (NO_CACHE.replace("t = Transpose<perm = [0, 2, 1, 3]>",
                                                 "t = Transpose<perm = [0, 3, 2, 1]>"), "y"),
    "gated attention": (NO_CACHE.replace("x = Reshape(t, join)", "j = Reshape(t, join) x = Mul(j, u)"), "y"),
    "values on the left": (NO_CACHE.replace("MatMul(q, r)", "MatMul(r, square)"), "y"),
}  # fmt: skip
"""Nodes and outputs of graphs in which division would change something else, or nobody can say what."""


@pytest.mark.parametrize("case", MUST_REFUSE)
def test_what_is_not_exact_is_refused(case: str) -> None:
    """Another reader, another layout, another function: no site."""
    nodes, outputs = MUST_REFUSE[case]
    assert _found(nodes, outputs) is None


def test_the_forms_above_differ_from_what_is_found_by_the_named_change_only() -> None:
    """The graphs that refusals are made from are found as they stand."""
    assert _found(WHOLE, "y, present") is not None
    assert _found(NO_CACHE, "y") is not None


def test_traced_models_have_them(llama_fp32: Traced, opt_fp32: Traced) -> None:
    """Torch's exporter writes these forms: one a layer, and the rule's own sites and reasons stay as they were."""
    for traced, kinds in ((llama_fp32, ["attention_value"]), (opt_fp32, ["relu_mlp"])):
        extensions = [site for site in traced.sites.fold_sites if site.kind in ("relu_mlp", "attention_value")]
        assert {site.kind for site in extensions} >= set(kinds)
        for site in extensions:
            assert all(traced.sites.linear(path).site is None for path in site.consumers)
            assert all(traced.sites.linear(path).no_site_reason for path in site.consumers)

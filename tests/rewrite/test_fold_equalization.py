from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.graph_io import data_path, load_graph, save_graph, write_weights
from fptq_export.rewrite.fold_equalization import FoldEqualization
from fptq_export.sites import FoldSite, Linear, Producer, Sites
from tests.support.traced import FP32_LOGITS, Traced, causal_feed, run

Scales = Mapping[str, NDArray[np.float32]]


def _scales(sites: Sites, seed: int = 0, sigma: float = 1.5) -> dict[str, NDArray[np.float32]]:
    """Lognormal s for every site: channels differ by factors of a thousand."""
    rng = np.random.default_rng(seed)
    return {
        site.id: site.tied(rng.lognormal(sigma=sigma, size=site.channels).astype(np.float32))
        for site in sites.fold_sites
    }


def _powers_of_two(sites: Sites) -> dict[str, NDArray[np.float32]]:
    return {site: np.exp2(np.rint(np.log2(scale))).astype(np.float32) for site, scale in _scales(sites).items()}


def _folded(traced: Traced, scales: Scales, path: Path) -> Path:
    model = load_graph(traced.model)
    FoldEqualization(traced.sites, scales)(model)
    write_weights(model, data_path(path))
    save_graph(model, path)
    onnx.checker.check_model(str(path))
    return path


def _logits(graph: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = run(graph, causal_feed(graph, ids), outputs=["logits"])["logits"]
    return logits


def _arrays(graph: Path) -> dict[str, NDArray[Any]]:
    values = load_graph(graph).graph.initializers
    return {name: value.const_value.numpy() for name, value in values.items() if value.const_value is not None}


@pytest.mark.parametrize("name", ["llama_fp32", "opt_fp32"])
def test_folding_powers_of_two_changes_no_bit(
    request: pytest.FixtureRequest, name: str, ids: NDArray[np.int64], tmp_path: Path
) -> None:
    """Division by 2^k rounds nothing, so a fold that is exact in theory leaves every logit as it was, bit for bit."""
    traced: Traced = request.getfixturevalue(name)
    scales = _powers_of_two(traced.sites)
    assert len({float(s) for scale in scales.values() for s in scale}) > 8, "the scales differ widely"
    folded = _folded(traced, scales, tmp_path / "folded.onnx")
    np.testing.assert_array_equal(_logits(folded, ids), _logits(traced.model, ids))


def test_decoding_behind_a_scaled_cache_changes_no_bit(
    llama_fp32: Traced, ids: NDArray[np.int64], tmp_path: Path
) -> None:
    """Where value rows are divided the cache holds v / s, and the next call takes it as its own: equal logits."""
    scales = _powers_of_two(llama_fp32.sites)
    values = [site for site in llama_fp32.sites.fold_sites if site.kind == "attention_value"]
    assert len(values) == 2
    folded = _folded(llama_fp32, scales, tmp_path / "folded.onnx")
    logits, caches = [], []
    for graph in (llama_fp32.model, folded):
        first = run(graph, causal_feed(graph, ids[:, :-1]))
        past = {f"past_key_values{name.removeprefix('present')}": first[name] for name in first if "present" in name}
        logits.append(run(graph, causal_feed(graph, ids[:, -1:], past), outputs=["logits"])["logits"])
        caches.append(first["present.0.value"])
    np.testing.assert_array_equal(logits[1], logits[0])
    s = values[0].producer_scale(scales[values[0].id]).reshape(1, caches[0].shape[1], 1, -1)
    np.testing.assert_array_equal(caches[1], caches[0] / s)


def test_scales_that_differ_between_heads_of_one_value_are_refused(llama_fp32: Traced) -> None:
    """A value row serves several query heads: it can be divided by one number only."""
    site = next(site for site in llama_fp32.sites.fold_sites if site.repeats > 1)
    untied = np.arange(1, site.channels + 1, dtype=np.float32)
    with pytest.raises(ir.passes.PreconditionError, match="differs where heads share values"):
        FoldEqualization(llama_fp32.sites, {site.id: untied})(load_graph(llama_fp32.model))


@pytest.mark.parametrize("name", ["llama_fp32", "opt_fp32", "gemma_fp32"])
def test_folding_wild_scales_leaves_the_logits(
    request: pytest.FixtureRequest, name: str, ids: NDArray[np.int64], tmp_path: Path
) -> None:
    """RMSNorm, LayerNorm with bias, 1 + w and gated MLP: lognormal scales in all sites, logits within FP32 rounding."""
    traced: Traced = request.getfixturevalue(name)
    before = _logits(traced.model, ids)
    after = _logits(_folded(traced, _scales(traced.sites), tmp_path / "folded.onnx"), ids)
    np.testing.assert_allclose(after, before, rtol=0.0, atol=FP32_LOGITS * np.abs(before).max())
    assert (after != before).any(), "nothing was folded"


def test_a_forgotten_bias_is_seen(opt_fp32: Traced, ids: NDArray[np.int64], tmp_path: Path) -> None:
    """The comparison above can fail: with LayerNorm's bias left out of the fold the logits are far away."""
    sites = opt_fp32.sites
    first = sites.fold_sites[0]
    broken = sites.model_copy(update={"fold_sites": (first.model_copy(update={"producers": first.producers[:1]}),)})
    scales = _scales(broken)
    before = _logits(opt_fp32.model, ids)
    after = _logits(
        _folded(Traced(opt_fp32.model, broken, opt_fp32.checkpoint, "fp32"), scales, tmp_path / "f.onnx"), ids
    )
    assert np.abs(after - before).max() > 10 * FP32_LOGITS * np.abs(before).max()


def test_sites_that_are_not_equalized_keep_every_bit(llama_fp32: Traced, tmp_path: Path) -> None:
    """Folding one norm changes its weight and the three weights that read it, and nothing else."""
    site = "model.layers.0.input_layernorm"
    scales = {site: _scales(llama_fp32.sites)[site]}
    before, after = _arrays(llama_fp32.model), _arrays(_folded(llama_fp32, scales, tmp_path / "folded.onnx"))
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert before.keys() == after.keys()
    attention = "model.layers.0.self_attn"
    assert changed == {f"{site}.weight", *(f"{attention}.{name}_proj.weight" for name in "qkv")}
    np.testing.assert_array_equal(after[f"{site}.weight"], before[f"{site}.weight"] / scales[site])
    query = f"{attention}.q_proj.weight"
    np.testing.assert_array_equal(after[query], before[query] * scales[site][:, None])


def test_no_equalization_changes_nothing(llama_fp32: Traced) -> None:
    """A policy without equalized sites leaves the graph alone, and the pass says so."""
    model = load_graph(llama_fp32.model)
    before = ir.to_proto(model)
    assert not FoldEqualization(llama_fp32.sites, {})(model).modified
    assert ir.to_proto(model) == before


def test_tied_head_is_cloned(opt_fp32: Traced, ids: NDArray[np.int64], tmp_path: Path) -> None:
    """A head tied to the embedding gets a weight of its own; the embedding keeps every bit, no node is left over."""
    site = opt_fp32.sites.linear("lm_head").site
    assert site is not None
    folded = _folded(opt_fp32, {site: _scales(opt_fp32.sites)[site]}, tmp_path / "folded.onnx")
    before, after = _arrays(opt_fp32.model), _arrays(folded)
    tied = opt_fp32.sites.linear("lm_head").weight
    np.testing.assert_array_equal(after[tied], before[tied])
    assert after.keys() - before.keys() == {"lm_head.equalized_weight"}
    nodes = onnx.load(folded, load_external_data=False).graph.node
    read = {name for node in nodes for name in node.input}
    outputs = {value.name for value in onnx.load(folded, load_external_data=False).graph.output}
    assert all(read & set(node.output) or outputs & set(node.output) for node in nodes)
    expected = _logits(opt_fp32.model, ids)
    np.testing.assert_allclose(_logits(folded, ids), expected, rtol=0.0, atol=FP32_LOGITS * np.abs(expected).max())


def _shared_weight() -> tuple[ir.Model, Sites]:
    """Two norms and two linears that share one weight; only the first norm is a site."""
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]> g (float[1, 4] u, float[1, 4] v) => (float[1, 2] y, float[1, 2] z)
        <float[4] w = {1, 2, 3, 4}, float[4, 2] W = {1, 2, 3, 4, 5, 6, 7, 8}>
        { x = Mul(u, w) y = MatMul(x, W) z = MatMul(v, W) }"""
    )
    for index, node in enumerate(model.graph):
        node.name = f"n{index}"
    site = FoldSite(
        id="norm", kind="norm", channels=4, producers=(Producer(initializer="w", axis=0),), consumers=("fc",)
    )
    linear = Linear(
        path="fc",
        node="n1",
        weight="W",
        weight_transposed=False,
        bias=None,
        in_features=4,
        out_features=2,
        input="x",
        site="norm",
        no_site_reason=None,
    )
    return model, Sites(linears=(linear,), fold_sites=(site,))


def test_shared_weight_is_cloned_for_its_consumer(tmp_path: Path) -> None:
    """A weight that another linear multiplies by is copied before its rows are scaled."""
    model, sites = _shared_weight()
    scale = np.array([2, 4, 8, 16], np.float32)
    feed = {"u": np.array([[1, -2, 3, 5]], np.float32), "v": np.ones((1, 4), np.float32)}
    save_graph(model, tmp_path / "before.onnx")
    FoldEqualization(sites, {"norm": scale})(model)
    save_graph(model, tmp_path / "after.onnx")
    arrays = _arrays(tmp_path / "after.onnx")
    np.testing.assert_array_equal(arrays["W"], np.arange(1, 9).reshape(4, 2))
    np.testing.assert_array_equal(arrays["fc.equalized_weight"], np.arange(1, 9).reshape(4, 2) * scale[:, None])
    before, after = (run(tmp_path / name, feed) for name in ("before.onnx", "after.onnx"))
    np.testing.assert_array_equal(after["y"], before["y"])
    np.testing.assert_array_equal(after["z"], before["z"])


def test_offset_norm_divides_one_plus_w() -> None:
    """Gemma: (w + 1) / s - 1, so that the graph's own 1 + w' is (1 + w) / s."""
    model, sites = _shared_weight()
    site = sites.fold_sites[0].model_copy(
        update={"kind": "offset_norm", "producers": (Producer(initializer="w", axis=0, offset=1.0),)}
    )
    FoldEqualization(sites.model_copy(update={"fold_sites": (site,)}), {"norm": np.full(4, 4, np.float32)})(model)
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), np.array([2, 3, 4, 5]) / 4 - 1)


@pytest.mark.parametrize(("axis", "initializer"), [(1, "W"), (0, "w")], ids=["columns of a matrix", "vector"])
def test_a_span_divides_its_part_and_leaves_the_rest(axis: int, initializer: str) -> None:
    """Up in one matrix with gate: two folds of two parts each change their own, and no bit of the other."""
    model, sites = _shared_weight()
    before = _initializer(model, initializer)
    size = before.shape[axis]
    folds = [(0, size // 2), (size // 2, size)]
    site = sites.fold_sites[0].model_copy(update={"consumers": (), "channels": size // 2})
    parts = [
        site.model_copy(
            update={"id": f"part {index}", "producers": (Producer(initializer=initializer, axis=axis, span=span),)}
        )
        for index, span in enumerate(folds)
    ]
    scale = np.full(size // 2, 2, np.float32)
    sites = sites.model_copy(update={"fold_sites": tuple(parts)})
    expected = before.copy()
    for part, span in zip(parts, folds, strict=True):
        FoldEqualization(sites, {part.id: scale})(model)
        np.moveaxis(expected, axis, -1)[..., slice(*span)] /= 2
        np.testing.assert_array_equal(_initializer(model, initializer), expected)


@pytest.mark.parametrize("span", [(0, 2), (2, 6), (1, 2)], ids=["too few", "beyond the end", "one of four"])
def test_a_span_of_another_length_is_refused(span: tuple[int, int]) -> None:
    """Sites of another graph: the error names the initializer before anything is changed."""
    model, sites = _shared_weight()
    site = sites.fold_sites[0].model_copy(update={"producers": (Producer(initializer="w", axis=0, span=span),)})
    with pytest.raises(ir.passes.PreconditionError, match="'w': 4 channels"):
        FoldEqualization(sites.model_copy(update={"fold_sites": (site,)}), {"norm": np.full(4, 2, np.float32)})(model)


def _initializer(model: ir.Model, name: str) -> NDArray[np.float32]:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    array: NDArray[np.float32] = tensor.numpy()
    return array


def test_offset_norm_keeps_its_digits_in_a_half_graph(tmp_path: Path) -> None:
    """1 + w of 0.7 over s = 20 is 0.035: in FP16, w' = -0.965 would round it by 0.7 %, so w' is stored in FP32."""
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]> g (float[1, 4] u) => (float16[1, 2] y)
        <float16[4] w = {0, 0, 0, 0}, float one = {1}, float16[4, 2] W = {1, 2, 3, 4, 5, 6, 7, 8}>
        { c = Cast<to = 1>(w) o = Add(c, one) p = Mul(u, o) x = Cast<to = 10>(p) y = MatMul(x, W) }"""
    )
    _, sites = _shared_weight()
    list(model.graph)[-1].name = "n1"
    weight = np.array([-0.3, -0.1, 0.2, 0.4], np.float16)
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    exact = (1 + weight.astype(np.float64)) / 20
    site = sites.fold_sites[0].model_copy(update={"producers": (Producer(initializer="w", axis=0, offset=1.0),)})
    FoldEqualization(sites.model_copy(update={"fold_sites": (site,)}), {"norm": np.full(4, 20, np.float32)})(model)
    save_graph(model, tmp_path / "folded.onnx")
    onnx.checker.check_model(str(tmp_path / "folded.onnx"), full_check=True)
    folded = _arrays(tmp_path / "folded.onnx")["w"].astype(np.float64)
    # w' lies in [-1, -0.5]: it is off by half a step of 2^-24 there, and so is the quotient before it.
    np.testing.assert_allclose(1 + folded, exact, rtol=0.0, atol=2 * 2.0**-25)
    assert [node.op_type for node in model.graph] == ["Add", "Mul", "Cast", "MatMul"]


def test_float16_overflow_names_the_site_and_a_way_out(llama_fp16: Traced, tmp_path: Path) -> None:
    """A weight that would become Inf stops the run when it is written, and no data file appears."""
    site = "model.layers.1.mlp.up_proj"
    scales = {site: np.full(128, 3e6, np.float32)}
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj.*down_proj\.weight' overflows FLOAT16[\s\S]*--dtype"):
        _folded(llama_fp16, scales, tmp_path / "folded.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "scale",
    [
        np.ones(3),
        np.ones((4, 1)),
        np.array([1, 1, 0, 1]),
        np.array([1, 1, -2, 1]),
        np.array([1, 1, np.nan, 1]),
        np.array([1, 1, np.inf, 1]),
    ],
    ids=["too short", "wrong rank", "zero", "negative", "NaN", "Inf"],
)
def test_unusable_scales_are_refused(scale: NDArray[np.float64]) -> None:
    """Scales divide and multiply: one positive finite number for each channel, checked before anything changes."""
    model, sites = _shared_weight()
    with pytest.raises(ir.passes.PreconditionError, match=r"'norm' must be 4 positive numbers"):
        FoldEqualization(sites, {"norm": scale.astype(np.float32)})(model)
    assert set(model.graph.initializers) == {"w", "W"}


def test_missing_producer_is_refused() -> None:
    """Sites of another graph are noticed before anything changes."""
    model, sites = _shared_weight()
    site = sites.fold_sites[0].model_copy(update={"producers": (Producer(initializer="elsewhere", axis=0),)})
    with pytest.raises(ir.passes.PreconditionError, match="no initializer 'elsewhere'"):
        FoldEqualization(sites.model_copy(update={"fold_sites": (site,)}), {"norm": np.ones(4, np.float32)})(model)

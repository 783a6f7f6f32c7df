"""The language half of a vision-language model: a graph behind embeddings, exact for text and for images."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from accelerate import init_empty_weights
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import load_file

from calib.fake_quant import applied_policy
from calib.halves import calibrated_model_from_checkpoint
from calib.load import checkpoint_from_directory
from calib.stream import blocks_path
from fptq_export.diff.report import DiffReport
from fptq_export.errors import UserError
from fptq_export.evaluate.report import EvalReport
from fptq_export.files import read_json_model
from fptq_export.graph_io import data_path, load_graph, save_graph, write_weights
from fptq_export.language_half import check_language_half
from fptq_export.options import RunOptions
from fptq_export.package.manifest import Manifest
from fptq_export.pipeline.summary import print_summary
from fptq_export.pipeline.task_options import check_task_options
from fptq_export.policy import PolicyArrays, arrays_path, read_policy
from fptq_export.progress import NoProgress
from fptq_export.rewrite import GraphForm, RewritePaths, rewrite
from fptq_export.rewrite.fold_equalization import FoldEqualization
from fptq_export.sites import read_sites
from fptq_export.tasks import VLM_DECODER, auto_class
from fptq_export.trace import trace
from fptq_export.verify.embedding_session import OnnxEmbeddingSession
from fptq_export.verify.report import VerifyReport
from tests.families.registry import LANGUAGE_HALF
from tests.families.support_table import Record
from tests.families.test_folds import EXACT, ROUNDED
from tests.families.test_parity import PARITY, TIERS
from tests.pipeline.conftest import Command, command
from tests.support.float64 import fold, lognormal_scales, output_in_float64
from tests.support.models import model_once
from tests.support.traced import FP32_LOGITS, Traced, run
from tests.support.vision_language import embeds_feed, seen_by_torch, tiny_smolvlm, vision_language_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    ModelDirFactory = Callable[[PretrainedConfig], Path]

__all__ = ["command"]

LINEARS, IMAGE_TOKENS = 7, 4
FLOAT64_TOLERANCE = 1000 * 2.0**-53
"""Relative: the same logits, added up in another order by two float64 programs of at most a thousand terms."""
"""Of the one layer of LLaVA, and tokens that stand for an image there."""
IDS = np.random.default_rng(4).integers(8, 512, (2, 9))


def _embeds(run_directory: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    (table,) = load_file(run_directory / "embeddings.safetensors").values()
    return np.asarray(table[ids])


def _assert_equal(actual: NDArray[np.float32], expected: NDArray[np.float32], bound: float = FP32_LOGITS) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=bound * np.abs(expected).max())


def test_the_graph_reads_embeddings_and_keeps_a_cache(llava_graph: Traced) -> None:
    """No token ids, no table of embeddings, nothing of the vision tower."""
    graph = load_graph(llava_graph.model).graph
    past, present = (["batch", "2", length, "16"] for length in ("past", "past + sequence"))
    inputs = {value.name: (value.dtype, [str(dim) for dim in value.shape or ()]) for value in graph.inputs}
    assert inputs == {
        "inputs_embeds": (ir.DataType.FLOAT, ["batch", "sequence", "64"]),
        "attention_mask": (ir.DataType.INT64, ["batch", "total"]),
        "position_ids": (ir.DataType.INT64, ["batch", "sequence"]),
        **{f"past_key_values.0.{name}": (ir.DataType.FLOAT, past) for name in ("key", "value")},
    }
    outputs = {value.name: [str(dim) for dim in value.shape or ()] for value in graph.outputs}
    assert outputs == {
        "logits": ["batch", "sequence", "512"],
        **{f"present.0.{name}": present for name in ("key", "value")},
    }
    assert not [name for name in graph.initializers if "embed_tokens" in name or "vision" in name]


def test_behind_an_image_the_graph_computes_what_the_whole_model_computes(llava_graph: Traced) -> None:
    """Embeddings of a real image among those of tokens, as torch's decoder reads them."""
    embeds, expected = seen_by_torch(vision_language_model(llava_graph.checkpoint), IMAGE_TOKENS)
    _assert_equal(run(llava_graph.model, embeds_feed(llava_graph.model, embeds))["logits"], expected)


def test_a_head_that_is_tied_to_the_embedding_is_in_the_graph(make_model_dir: ModelDirFactory, tmp_path: Path) -> None:
    """SmolVLM: the table is no part of the graph, the head is its own, and an image gives torch's logits."""
    directory = model_once(make_model_dir, tiny_smolvlm())
    checkpoint = checkpoint_from_directory(directory, "smolvlm")
    graph = tmp_path / "model.onnx"
    stored = {name: entry.stored for name, entry in checkpoint.tensors.items()}
    paths = (graph, tmp_path / "sites.json")
    sites = trace(checkpoint.config, stored, "fp32", *paths, NoProgress(), task=checkpoint.task)
    assert sites.outside == ("model.vision_model", "model.connector")
    assert sites.linear("lm_head").site == "model.text_model.norm"
    embeds, expected = seen_by_torch(vision_language_model(directory), 1)
    _assert_equal(run(graph, embeds_feed(graph, embeds))["logits"], expected)


def test_the_table_is_what_the_embedding_of_the_model_gives(llava_run: Path, llava_dir: Path) -> None:
    """Every row, to the bit; so text through the table is text through torch."""
    model = vision_language_model(llava_dir)
    with torch.inference_mode():
        expected = model.get_input_embeddings()(torch.arange(512)).numpy()
        logits = model(input_ids=torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_array_equal(_embeds(llava_run, np.arange(512)), expected)
    graph = llava_run / "model.onnx"
    _assert_equal(run(graph, embeds_feed(graph, _embeds(llava_run, IDS)))["logits"], logits)


def test_sites_are_those_of_the_language_model(llava_graph: Traced, record: Record) -> None:
    """The norm behind the embeddings is a site, and every linear of the decoder is in the graph."""
    with record.cell(LANGUAGE_HALF, "sites") as cell:
        sites = llava_graph.sites
        found = [(site.kind, " ".join(path.rpartition(".")[2] for path in site.consumers)) for site in sites.fold_sites]
        assert found == list(LANGUAGE_HALF.sites)
        reasons = {linear.path: linear.no_site_reason or "" for linear in sites.linears if linear.site is None}
        for path, reason in reasons.items():
            assert [words for end, words in LANGUAGE_HALF.no_site.items() if path.endswith(end) and words in reason]
        assert sites.unmatched == ()
        cell.text = f"{len(sites.site_by_consumer())} of {len(sites.linears)}"


def test_folds_are_exact(llava_graph: Traced, llava_run: Path, record: Record, tmp_path: Path) -> None:
    """Every site at once, s from 0.01 to 100: torch in float64, and the FP32 graph in ONNX Runtime."""
    with record.cell(LANGUAGE_HALF, "folds") as cell:
        sites, scales = llava_graph.sites, lognormal_scales(llava_graph.sites.fold_sites)
        model = vision_language_model(llava_graph.checkpoint, torch.float64).double()
        exact = output_in_float64(model, IDS)
        largest = float(exact.abs().max())
        for site in sites.fold_sites:
            fold(model, site, scales[site.id])
        assert 0.0 < float((output_in_float64(model, IDS) - exact).abs().max()) <= EXACT * largest

        graph = load_graph(llava_graph.model)
        FoldEqualization(sites, scales)(graph)
        folded = tmp_path / "folded.onnx"
        write_weights(graph, data_path(folded))
        save_graph(graph, folded)
        actual = run(folded, embeds_feed(folded, _embeds(llava_run, IDS)), outputs=["logits"])["logits"]
        np.testing.assert_allclose(actual, exact.numpy(), rtol=0.0, atol=ROUNDED * largest)
        cell.text = "exact"


def test_every_tier_is_in_the_policy_and_what_is_outside_is_named(llava_run: Path, record: Record) -> None:
    """Vision tower and projector are no layers of the policy; policy and summary name them."""
    with record.cell(LANGUAGE_HALF, "policies") as cell:
        policy = read_policy(llava_run / "policy.json")
        assert policy.outside == ("model.vision_tower", "model.multi_modal_projector")
        assert policy.layers.keys() - policy.quantized().keys() == {"lm_head"}
        assert all(path.startswith("model.language_model.") for path in policy.quantized())
        assert {layer.activation for layer in policy.quantized().values()} == set(TIERS)
        printed = io.StringIO()
        manifest = read_json_model(llava_run / "manifest.json", Manifest)
        print_summary(manifest, Console(file=printed, width=200))
        assert "model.vision_tower, model.multi_modal_projector" in printed.getvalue()
        assert "none of images" in printed.getvalue()
        cell.text = ", ".join(TIERS.values())


def test_the_quantized_graph_computes_what_the_policy_says(llava_run: Path, llava_dir: Path, record: Record) -> None:
    """W4A8 in ONNX Runtime, behind an image, is the whole torch model with fake quantization."""
    with record.cell(LANGUAGE_HALF, "parity") as cell:
        model, sites = vision_language_model(llava_dir), read_sites(llava_run / "sites.json")
        embeds, floating = seen_by_torch(model, IMAGE_TOKENS)
        arrays = load_file(llava_run / "policy.safetensors")
        with applied_policy(model, read_policy(llava_run / "policy.json"), arrays, sites):
            same, expected = seen_by_torch(model, IMAGE_TOKENS)
        np.testing.assert_array_equal(same, embeds)  # vision tower and projector are not quantized
        graph = llava_run / "model.w4a8.onnx"
        _assert_equal(run(graph, embeds_feed(graph, embeds))["logits"], expected, PARITY)
        assert np.abs(floating - expected).max() > 3 * PARITY * np.abs(expected).max(), "quantization would not be seen"
        cell.text = "equal"


def test_a_call_behind_either_cache_is_the_end_of_the_whole(llava_run: Path, record: Record, tmp_path: Path) -> None:
    """The growing cache, and the one that is written in place."""
    with record.cell(LANGUAGE_HALF, "kv") as cell:
        sites, policy = read_sites(llava_run / "sites.json"), read_policy(llava_run / "policy.json")
        static = RewritePaths(llava_run / "model.onnx", tmp_path / "model.qdq.onnx", tmp_path / "model.w4a8.onnx")
        arrays = PolicyArrays(arrays_path(llava_run / "policy.json"))
        rewrite(static, sites, policy, arrays, NoProgress(), GraphForm(kv_cache="static"))
        for graph in (llava_run / "model.w4a8.onnx", static.w4a8):
            session = OnnxEmbeddingSession(graph, llava_run / "embeddings.safetensors", threads=1, optimization="none")
            whole, _ = session.prefill(IDS)
            _, cache = session.prefill(IDS[:, :-1])
            logits, _ = session.decode(IDS[:, -1:], cache)
            _assert_equal(logits, whole[:, -1:], PARITY)
        cell.text = "concat, static"


def test_the_engine_holds_every_linear_of_the_half(llava_run: Path, record: Record) -> None:
    """The layer list is compared with the policy."""
    with record.cell(LANGUAGE_HALF, "engine") as cell:
        summary = read_json_model(llava_run / "manifest.json", Manifest).stages["build"].summary
        assert (llava_run.parent / "out.plan").stat().st_size > 0
        assert summary["quantized_linears"] == LINEARS
        cell.text = "built"


def test_text_is_measured_through_the_embeddings(llava_run: Path, tmp_path: Path, command: Command) -> None:
    """Verification and `eval` look tokens up in the table: the graph's perplexity is that of fake quantization."""
    report = read_json_model(llava_run / "verify.json", VerifyReport)
    assert report.cache.within_bound
    outcome = command("eval", llava_run, "-o", tmp_path / "eval", "--eval-windows", "1", "--eval-seq", "80")
    assert outcome.code == 0, outcome.err
    found = read_json_model(tmp_path / "eval" / "eval.json", EvalReport)
    perplexity = {name: figures.perplexity for name, figures in found.texts[0].perplexity.items()}
    quantized = abs(perplexity["float"] - perplexity["fake-quant"])
    assert abs(perplexity["onnx"] - perplexity["fake-quant"]) < quantized / 3


def test_difference_is_measured_and_saved_through_the_embeddings(
    llava_run: Path, tmp_path: Path, command: Command
) -> None:
    """`diff` feeds both models the same tokens, and writes the embeddings that the graph reads for them."""
    words = ("--eval-windows", "1", "--eval-seq", "80", "--decode-steps", "2", "--systems", "onnx")
    outcome = command("diff", llava_run, "-o", tmp_path, "--save-io", tmp_path / "io", *words)
    assert outcome.code == 0, outcome.err
    (found,) = read_json_model(tmp_path / "diff.json", DiffReport).candidates
    verified = read_json_model(llava_run / "verify.json", VerifyReport)
    assert found.prefill.logits.kl_mean == pytest.approx(verified.logits.kl_mean, rel=FLOAT64_TOLERANCE, abs=0.0)
    assert (tmp_path / "io" / "decode" / "inputs_embeds.bin").stat().st_size > 0
    assert "input_ids" not in (tmp_path / "io" / "decode" / "trtexec.args").read_text(encoding="utf-8")


def test_calibration_streams_the_blocks_of_the_language_model(llava_dir: Path) -> None:
    """Not those of the vision tower, which has more weights here."""
    whole = vision_language_model(llava_dir)
    assert blocks_path(whole) == "model.vision_tower.encoder.layers"
    checkpoint = checkpoint_from_directory(llava_dir, "llava")
    assert blocks_path(calibrated_model_from_checkpoint(checkpoint, torch.float32)) == "model.language_model.layers"


def test_a_table_of_another_model_is_refused(llava_run: Path, tmp_path: Path) -> None:
    """A file that is missing, or of another width, is named."""
    with pytest.raises(UserError, match="no such file"):
        OnnxEmbeddingSession(llava_run / "model.w4a8.onnx", tmp_path / "none.safetensors", threads=1)
    with pytest.raises(UserError, match="reads 64 numbers a token"):
        OnnxEmbeddingSession(llava_run / "model.w4a8.onnx", llava_run / "policy.safetensors", threads=1)


_SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
_MROPE_VISION = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
_SEES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "settings", "reason"),
    [
        ("Qwen2VLConfig", {"text_config": _SMALL, "vision_config": _MROPE_VISION}, "M-RoPE"),
        ("Gemma3Config", {"text_config": _SMALL, "vision_config": _SEES}, "token_type_ids"),
        ("PaliGemmaConfig", {"text_config": {"model_type": "gemma", **_SMALL}}, "token_type_ids"),
        (
            "MllamaConfig",
            {"text_config": {**_SMALL, "cross_attention_layers": [0], "pad_token_id": 0}},
            "cross_attention_states",
        ),
        ("Blip2Config", {"text_config": {"model_type": "opt", **_SMALL}}, "no past_key_values"),
    ],
)
def test_models_that_need_more_of_an_image_than_embeddings_are_refused(
    config: str, settings: dict[str, Any], reason: str
) -> None:
    """By what transformers' modules take; each names what the graph could not be given."""
    with init_empty_weights():
        built = getattr(transformers, config)(**settings)
        model = auto_class(built, VLM_DECODER).from_config(built)
    with pytest.raises(UserError, match=reason):
        check_language_half(model)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"policy": "auto"}, "--policy auto.*language half"),
        ({"rotate": True}, "--rotate.*images"),
        ({"adapter": "lora"}, "--adapter.*vision tower"),
        ({"checkpoint": "ct"}, "--checkpoint"),
        ({"min_cosine": 0.9}, "--min-cosine"),
    ],
)
def test_options_that_are_not_for_language_halves_are_refused(given: dict[str, Any], reason: str) -> None:
    """Each is named with its reason."""
    options = RunOptions.model_validate({"model": "llava", "output": "run", **given})
    with pytest.raises(UserError, match=reason):
        check_task_options(options, VLM_DECODER)


def test_a_model_that_cannot_be_cut_is_refused_before_any_work(
    make_model_dir: ModelDirFactory, tmp_path: Path, command: Command
) -> None:
    """The command names what it lacks; nothing was written."""
    config = transformers.Qwen2VLConfig(text_config={**_SMALL, "intermediate_size": 32}, vision_config=_MROPE_VISION)
    outcome = command(make_model_dir(config), "-o", tmp_path / "run")
    assert outcome.code == 1
    assert "M-RoPE" in outcome.err
    assert not list(tmp_path.rglob("*.onnx"))


def test_a_lost_table_is_written_again(llava_run: Path, llava_dir: Path, tmp_path: Path, command: Command) -> None:
    """It is an output of trace, so a run that lacks it does not go on as if nothing were missing."""
    copy = Path(shutil.copytree(llava_run, tmp_path / "run"))
    (copy / "embeddings.safetensors").unlink()
    outcome = command("trace", llava_dir, "-o", copy, "--dtype", "fp32")
    assert outcome.code == 0, outcome.err
    table = (copy / "embeddings.safetensors").read_bytes()
    assert table == (llava_run / "embeddings.safetensors").read_bytes()

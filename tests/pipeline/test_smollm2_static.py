"""`--kv-cache static` on SmolLM2-135M: fused attention in the engine, and the same text as the growing cache."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from fptq_export.build.layer_list import layers_from_log
from fptq_export.cli import main
from fptq_export.files import read_json_model
from fptq_export.graph_io import load_graph, save_graph
from fptq_export.package.manifest import Manifest
from fptq_export.rewrite.graph_form import GraphForm, bring_into_form
from fptq_export.verify.sessions import OnnxCausalSession
from tests.pipeline.test_graph_forms import FUSED_ATTENTION

pytestmark = pytest.mark.slow

LAYERS = 30
LINEARS = 7 * LAYERS
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def run(smollm2_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run without its checkpoint, rewritten to a static cache; the engine beside it."""
    copy = tmp_path_factory.mktemp("smollm2-static") / "run"
    shutil.copytree(smollm2_run, copy, ignore=shutil.ignore_patterns("checkpoint"))
    assert main(["rewrite", str(copy), "--kv-cache", "static", "--logits", "last"]) == 0
    words = ["build", str(copy), "--engine", str(copy.parent / "out.plan"), "--compute-capability", "8.6"]
    assert main(words) == 0
    logging.disable(logging.NOTSET)
    return copy


def test_the_engine_runs_every_attention_in_one_layer(run: Path) -> None:
    """Thirty fused attentions; every quantized linear is there as INT4, as with the growing cache."""
    layers = layers_from_log(run / "build.log")
    assert sum(FUSED_ATTENTION in layer.name for layer in layers) == LAYERS
    stages = read_json_model(run / "manifest.json", Manifest).stages
    assert stages["rewrite"].summary["fused"] == {
        "RMSNormalization": 2 * LAYERS + 1,
        "RotaryEmbedding": 2 * LAYERS,
        "Attention": LAYERS,
    }
    assert stages["build"].summary["quantized_linears"] == LINEARS
    assert stages["build"].summary["unfused"] == []


def test_both_caches_write_the_same_text(run: Path) -> None:
    """Sixty-four greedy tokens of the FP16 graph, before quantization, which would amplify a rounding to a step."""
    model = load_graph(run / "model.onnx")
    bring_into_form(model, GraphForm(kv_cache="static"))
    save_graph(model, run / "static.onnx")
    prompt = Tokenizer.from_file(str(run / "tokenizer.json")).encode("The capital of France is").ids
    assert greedy(run / "static.onnx", prompt) == greedy(run / "model.onnx", prompt)


def greedy(graph: Path, prompt: list[int]) -> list[int]:
    """The tokens a graph puts first, fed back to it."""
    session = OnnxCausalSession(graph, threads=None)
    logits, cache = session.prefill(np.array([prompt], np.int64))
    tokens = [int(logits[0, -1].argmax())]
    while len(tokens) < NEW_TOKENS:
        logits, cache = session.decode(np.array([tokens[-1:]], np.int64), cache)
        tokens.append(int(logits[0, -1].argmax()))
    return tokens

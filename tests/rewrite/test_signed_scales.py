"""Negative group scales in the exported graph, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fptq_export.packing import int4_from_packed, packed_from_int4
from fptq_export.policy import PolicyArrays, arrays_path, write_policy
from fptq_export.progress import NoProgress
from fptq_export.rewrite import RewritePaths, rewrite
from tests.rewrite.conftest import Rewritten
from tests.support.traced import causal_feed, run


@pytest.fixture(scope="module")
def negated(llama_rewritten: Rewritten, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model.w4a8.onnx` with every second row of codes and scales times -1: the same weights."""
    directory = tmp_path_factory.mktemp("negated")
    arrays = load_file(llama_rewritten.arrays.path)
    for path in llama_rewritten.policy.quantized():
        codes = int4_from_packed(arrays[f"{path}.weight_codes"])
        assert codes.min() >= -7, "-8 has no INT4 opposite"
        codes[::2] *= -1
        arrays[f"{path}.weight_codes"] = packed_from_int4(codes)
        arrays[f"{path}.weight_scales"][::2] *= -1
    write_policy(llama_rewritten.policy, arrays, directory / "policy.json")
    paths = RewritePaths(llama_rewritten.traced.model, directory / "model.qdq.onnx", directory / "model.w4a8.onnx")
    stored = PolicyArrays(arrays_path(directory / "policy.json"))
    rewrite(paths, llama_rewritten.traced.sites, llama_rewritten.policy, stored, NoProgress())
    return paths.w4a8


def test_negated_codes_and_scales_are_the_same_model(
    llama_rewritten: Rewritten, negated: Path, ids: NDArray[np.int64]
) -> None:
    """(-code) x (-scale) is code x scale exactly, so the logits keep every bit without graph optimizations."""
    expected, logits = (run(graph, causal_feed(graph, ids))["logits"] for graph in (llama_rewritten.w4a8, negated))
    assert logits.tobytes() == expected.tobytes()

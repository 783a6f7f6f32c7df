"""The real sentence encoder, all-MiniLM-L6-v2, on the whole road; a sample starts from the same run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fptq_export.files import read_json_model
from fptq_export.policy import read_policy
from fptq_export.verify.encoder_report import EncoderReport


@pytest.mark.slow
def test_the_real_minilm_keeps_its_embeddings(minilm_run: Path) -> None:
    """W4A8 of real weights: the mean embedding cosine that the README promises, on 200 held-out sentences."""
    report = read_json_model(minilm_run / "verify.json", EncoderReport)
    assert report.embeddings.vectors == 200
    assert report.embeddings.mean >= 0.97
    layers = read_policy(minilm_run / "policy.json").layers
    assert len(layers) == 36
    assert {layer.precision for layer in layers.values()} == {"w4a8"}

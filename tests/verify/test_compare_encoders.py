"""Encoders side by side: cosines, retrieval, padding, and the gate on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fptq_export.errors import ExitCode, GateError, UserError, UserErrors
from fptq_export.files import write_json_model
from fptq_export.verify.compare_encoders import compare_encoders, retrieval_agreement
from fptq_export.verify.encoder_report import EncoderReport, gate_cosine, report_from_file
from fptq_export.verify.encoder_sessions import OnnxEncoderSession
from tests.support.traced import FP32_LOGITS, Traced, encoder_feed, torch_hidden

ROUNDING = 64 * 2.0**-53
"""Cosine of a vector with itself: sums of at most 16 terms in float64, a root and two divisions."""
LENGTHS = (7, 3, 5, 2, 6, 4, 7, 3, 5)
"""More texts than run at a time."""


@dataclass(frozen=True)
class Toy:
    """Hidden state = row of the token plus the mean of the rows of the tokens it sees."""

    name: str
    rows: NDArray[np.float32]
    sees_padding: bool = False

    def hidden(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """[B, S] -> [B, S, H]."""
        own = self.rows[input_ids]
        mask = (np.ones_like(attention_mask) if self.sees_padding else attention_mask)[..., None]
        result: NDArray[np.float32] = own + (own * mask).sum(axis=1, keepdims=True) / mask.sum(axis=1, keepdims=True)
        return result


def _rows(seed: int = 0, channels: int = 16) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(32, channels)).astype(np.float32)


def _texts() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    ids = np.random.default_rng(1).integers(1, 32, mask.shape)
    return np.where(mask == 1, ids, 0), mask


def _compared(reference: Toy, candidate: Toy) -> EncoderReport:
    return compare_encoders(reference, candidate, *_texts(), "toy texts")


def test_a_model_equals_itself() -> None:
    """Cosines of 1, the same neighbours; every real token and every text is counted once."""
    report = _compared(Toy("a", _rows()), Toy("b", _rows()))
    assert (report.hidden.vectors, report.embeddings.vectors) == (sum(LENGTHS), len(LENGTHS))
    assert 1.0 - report.hidden.min <= ROUNDING
    assert 1.0 - report.embeddings.min <= ROUNDING
    assert (report.retrieval.top1_agreement, report.retrieval.nearest, report.retrieval.overlap) == (1.0, 5, 1.0)
    assert (report.hidden_size, report.text) == (16, "toy texts")


def test_a_candidate_that_sees_padding_is_found_out() -> None:
    """The reference never has padding, the candidate does: a mask that is not used costs accuracy here."""
    report = _compared(Toy("a", _rows()), Toy("b", _rows(), sees_padding=True))
    assert report.embeddings.min < 1.0 - 1000 * ROUNDING


def test_figures_by_hand() -> None:
    """One token a text, one channel turned by 60 degrees: a cosine of 1/2 for that text, 1 for the other."""
    rows = np.zeros((3, 2), np.float32)
    rows[1], rows[2] = (1, 0), (0, 1)
    turned = rows.copy()
    turned[1] = (0.5, np.sqrt(0.75))
    ids = np.array([[1], [2]])
    report = compare_encoders(Toy("a", rows), Toy("b", turned), ids, np.ones_like(ids), "by hand")
    assert abs(report.embeddings.min - 0.5) < 2.0**-23
    assert abs(report.embeddings.mean - 0.75) < 2.0**-23
    assert report.retrieval.nearest == 1


def test_retrieval_by_hand() -> None:
    """Seven points on a circle; moving one of them changes what its neighbours find first, and no more."""
    angles = np.radians([0.0, 10.0, 25.0, 100.0, 115.0, 200.0, 290.0])
    moved = angles.copy()
    moved[1] = np.radians(14.0)
    first, second = (np.stack([np.cos(a), np.sin(a)], axis=1) for a in (angles, moved))
    assert retrieval_agreement(first, first).top1_agreement == 1.0
    found = retrieval_agreement(first, second)
    # Point 1 finds point 2 where it found point 0; all others find what they found.
    assert found.top1_agreement == 6 / 7
    assert found.overlap == 1.0


def test_length_is_no_difference() -> None:
    """Neighbours are found by cosine: a vector ten times as long is no nearer and no farther."""
    vectors = _rows().astype(np.float64)
    assert retrieval_agreement(vectors, vectors * np.linspace(1, 10, len(vectors))[:, None]).top1_agreement == 1.0


def test_what_cannot_be_compared_is_refused() -> None:
    """One text, other sizes, states that are not numbers: each is named."""
    toy = Toy("a", _rows())
    ids, mask = _texts()
    with pytest.raises(UserError, match="at least two"):
        compare_encoders(toy, toy, ids[:1], mask[:1], "one")
    with pytest.raises(UserError, match="8 and 16 channels"):
        _compared(toy, Toy("b", _rows(channels=8)))
    with pytest.raises(UserError, match="NaN or infinite"):
        _compared(toy, Toy("b", np.full_like(_rows(), np.nan)))


@pytest.mark.parametrize(("limit", "refused"), [(None, False), (0.5, False), (1.0, True)])
def test_the_gate_stands_on_the_mean_of_embeddings(limit: float | None, refused: bool) -> None:
    """Below the limit the run fails with its own exit code, and both numbers are named."""
    report = _compared(Toy("a", _rows()), Toy("b", (_rows() + 0.2 * _rows(9)).astype(np.float32)))
    assert 0.5 < report.embeddings.mean < 1.0
    if not refused:
        gate_cosine(report, limit)
        return
    with pytest.raises(GateError, match=f"{report.embeddings.mean:.4f}.*limit is 1.0000") as caught:
        gate_cosine(report, limit)
    assert caught.value.exit_code == ExitCode.ACCURACY_GATE


def test_the_file_says_which_report_it_is(tmp_path: Path) -> None:
    """An encoder's figures come back as they were; a file of neither kind lists what it lacks."""
    path = tmp_path / "verify.json"
    report = _compared(Toy("a", _rows()), Toy("b", _rows()))
    write_json_model(report, path)
    assert report_from_file(path) == report
    path.write_text('{"kind": "image"}')
    with pytest.raises(UserErrors, match="reference_perplexity"):
        report_from_file(path)


@pytest.mark.parametrize("model", ["bert_fp32", "esm_fp32"])
def test_the_session_gives_the_hidden_states_of_torch(request: pytest.FixtureRequest, model: str) -> None:
    """With and without an input for segments."""
    traced: Traced = request.getfixturevalue(model)
    ids = np.random.default_rng(3).integers(40, 512, (2, 6))
    feed = encoder_feed(ids)
    expected = torch_hidden(traced.checkpoint, feed)
    actual = OnnxEncoderSession(traced.model, threads=1).hidden(ids, feed["attention_mask"])
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=FP32_LOGITS * np.abs(expected).max())


def test_a_text_longer_than_the_table_of_positions_is_a_user_error(bert_fp32: Traced) -> None:
    """ONNX Runtime's own message is not all there is."""
    ids = np.full((1, 200), 50)
    with pytest.raises(UserError, match="ONNX Runtime cannot run it"):
        OnnxEncoderSession(bert_fp32.model, threads=1).hidden(ids, np.ones_like(ids))


def test_a_causal_graph_is_no_encoder(llama_fp32: Traced) -> None:
    """Its inputs and outputs are listed."""
    with pytest.raises(UserErrors, match="last_hidden_state"):
        OnnxEncoderSession(llama_fp32.model, threads=1)

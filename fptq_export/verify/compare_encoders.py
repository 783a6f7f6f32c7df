"""A candidate encoder against its reference on the same texts: hidden states, text embeddings, retrieval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.progress import NoProgress, Progress
from fptq_export.verify.encoder_report import CosineFigures, EncoderReport, RetrievalFigures
from fptq_export.verify.encoder_sessions import EncoderSession, FeatureSession

__all__ = ["NEAREST", "compare_encoders", "compare_feature_encoders", "retrieval_agreement"]

NEAREST = 5
_BATCH = 8
"""Texts the candidate runs at a time, the longest one setting the width: its mask has something to hide."""


def compare_encoders(
    reference: EncoderSession,
    candidate: EncoderSession,
    input_ids: NDArray[np.int64],
    attention_mask: NDArray[np.int64],
    text: str,
    progress: Progress | None = None,
) -> EncoderReport:
    """Measure how far a candidate is from its reference.

    The reference runs each text alone and without padding, the candidate runs padded batches: a graph that looks at
    padding is as far off as it would be in use. A text's embedding is the mean of the hidden states of its tokens.

    Args:
        reference: The model to be reproduced.
        candidate: The model to be judged.
        input_ids: int64 [n, S], n >= 2.
        attention_mask: int64 [n, S]: 1 for tokens, then 0 for padding; every text has a token.
        text: Where the texts come from, for the report.
        progress: Where to report.

    Raises:
        UserError: There is less than two texts, or hidden states differ in size or are NaN or infinite.
    """
    if len(input_ids) < 2:
        raise UserError("verification text", f"{len(input_ids)} text(s) cannot be compared", "give at least two")
    lengths = attention_mask.sum(axis=1)
    progress = NoProgress() if progress is None else progress
    pairs = []
    with progress.task("Comparing hidden states", total=int(lengths.sum()), unit="tokens") as task:
        for start in range(0, len(input_ids), _BATCH):
            batch = slice(start, start + _BATCH)
            width = int(lengths[batch].max())
            hidden = _hidden(candidate, input_ids[batch, :width], attention_mask[batch, :width])
            for row, length in enumerate(lengths[batch]):
                ids = input_ids[start + row : start + row + 1, :length]
                pairs.append((_hidden(reference, ids, np.ones_like(ids))[0], hidden[row, :length]))
                task.advance(int(length))
    return _report((reference.name, candidate.name), pairs, text)


def compare_feature_encoders(
    reference: FeatureSession,
    candidate: FeatureSession,
    features: NDArray[np.float32],
    text: str,
    progress: Progress | None = None,
) -> EncoderReport:
    """The same for encoders of speech: windows of one length, run one at a time by both.

    Args:
        reference: The model to be reproduced.
        candidate: The model to be judged.
        features: float32 [n, mel bins, frames], n >= 2.
        text: Where the windows come from, for the report.
        progress: Where to report.

    Raises:
        UserError: There is less than two windows, or hidden states differ in size or are NaN or infinite.
    """
    if len(features) < 2:
        raise UserError("verification data", f"{len(features)} window(s) cannot be compared", "give at least two")
    progress = NoProgress() if progress is None else progress
    pairs = []
    with progress.task("Comparing hidden states", total=len(features), unit="windows") as task:
        for window in np.split(features, len(features)):
            hidden = [_checked(session.name, session.hidden(window), (1,))[0] for session in (reference, candidate)]
            pairs.append((hidden[0], hidden[1]))
            task.advance()
    return _report((reference.name, candidate.name), pairs, text)


def _report(
    names: tuple[str, str], pairs: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], text: str
) -> EncoderReport:
    """Figures of the hidden states of each text, (reference, candidate), each [S, H]."""
    sizes = {pair[side].shape[-1] for pair in pairs for side in (0, 1)}
    if len(sizes) > 1:
        cause = f"hidden states of {' and '.join(map(str, sorted(sizes)))} channels cannot be compared"
        raise UserError(", ".join(names), cause, "compare a model with its own export")
    embeddings = [np.stack([pair[side].mean(axis=0) for pair in pairs]) for side in (0, 1)]
    return EncoderReport(
        reference=names[0],
        candidate=names[1],
        text=text,
        hidden_size=sizes.pop(),
        hidden=_figures(np.concatenate([_cosine(*pair) for pair in pairs])),
        embeddings=_figures(_cosine(*embeddings)),
        retrieval=retrieval_agreement(*embeddings),
    )


def retrieval_agreement(reference: NDArray[np.float64], candidate: NDArray[np.float64]) -> RetrievalFigures:
    """Compare what each text finds nearest, by the embeddings of two models.

    Args:
        reference: float64 [n, H], n >= 2.
        candidate: float64 [n, H'].
    """
    nearest = min(NEAREST, len(reference) - 1)
    orders = [_nearest(vectors, nearest) for vectors in (reference, candidate)]
    shared = [len(set(r) & set(c)) for r, c in zip(*(order.tolist() for order in orders), strict=True)]
    return RetrievalFigures(
        top1_agreement=float((orders[0][:, 0] == orders[1][:, 0]).mean()),
        nearest=nearest,
        overlap=float(np.mean(shared)) / nearest,
    )


def _nearest(vectors: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Indices of the nearest other vectors by cosine, the nearest first: [n, count]."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norms == 0.0, 1.0, norms)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    order: NDArray[np.intp] = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    return order


def _hidden(
    session: EncoderSession, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Hidden states of a batch after a look at them, float64 [B, S, H]."""
    hidden = session.hidden(input_ids, attention_mask)
    return _checked(session.name, hidden, input_ids.shape, attention_mask == 1)


def _checked(
    name: str, hidden: NDArray[np.float32], shape: tuple[int, ...], real: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Hidden states, float64, if their shape begins with `shape` and those of real tokens (None: all) are finite."""
    if hidden.ndim != 3 or hidden.shape[: len(shape)] != shape:
        cause = f"hidden states have shape {hidden.shape}, not {(*shape, 'hidden')}"
        raise UserError(name, cause, "export it again")
    if not np.isfinite(hidden if real is None else hidden[real]).all():
        hint = "an FP16 overflow is the usual cause: export with --dtype fp32"
        raise UserError(name, "hidden states are NaN or infinite", hint)
    return hidden.astype(np.float64)


def _cosine(r: NDArray[np.float64], c: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine similarity of each pair of rows, [n, H] and [n, H] -> [n]; 1 for two zero vectors, 0 for one."""
    norms = np.linalg.norm(r, axis=1) * np.linalg.norm(c, axis=1)
    both_zero = ~r.any(axis=1) & ~c.any(axis=1)
    cosine = np.where(both_zero, 1.0, np.einsum("nh,nh->n", r, c) / np.where(norms == 0.0, 1.0, norms))
    return np.clip(cosine, -1.0, 1.0)  # rounding takes it past 1


def _figures(cosine: NDArray[np.float64]) -> CosineFigures:
    return CosineFigures(vectors=len(cosine), mean=float(cosine.mean()), min=float(cosine.min()))

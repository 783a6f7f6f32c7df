"""The output diff by Polygraphy, and the files with which its command line repeats it.

`polygraphy run model.w4a8.onnx --onnxrt --load-inputs inputs.json --load-outputs outputs.json --compare
cosine_similarity psnr l2`, with `--cosine-similarity-threshold`, `--psnr-threshold` and `--l2-threshold` to taste.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import polygraphy
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import (
    Comparator,
    CosineSimilarityCompareFunc,
    IterationResult,
    L2CompareFunc,
    PsnrCompareFunc,
    RunResults,
)
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

from fptq_export.errors import UserError
from fptq_export.files import atomic_path
from fptq_export.verify.report import PolygraphyFigures
from fptq_export.verify.sessions import CausalSession

__all__ = ["CausalRunner", "diff_logits", "diff_sessions", "save_arrays", "save_outputs"]

_OUTPUT = "logits"


class CausalRunner(BaseRunner):  # type: ignore[misc]
    """A CausalSession as a Polygraphy runner: `input_ids` int64 [B, S] -> `logits` float32 [B, S, V].

    Args:
        session: The session; it stays open when the runner is deactivated.
        name: Polygraphy's name for it; must differ between the runners of one comparison.
    """

    def __init__(self, session: CausalSession, name: str) -> None:
        super().__init__(name=name)
        self._session = session

    def get_input_metadata_impl(self) -> TensorMetadata:
        """The token ids: batch and length are dynamic."""
        return TensorMetadata().add("input_ids", dtype=np.dtype(np.int64), shape=(None, None))

    def infer_impl(self, feed_dict: Mapping[str, NDArray[Any]]) -> OrderedDict[str, NDArray[np.float32]]:
        """Run a prompt and time it."""
        started = time.perf_counter()
        logits, _ = self._session.prefill(feed_dict["input_ids"])
        self.inference_time = time.perf_counter() - started
        return OrderedDict({_OUTPUT: logits})


def diff_sessions(
    reference: CausalSession,
    candidate: CausalSession,
    window: NDArray[np.int64],
    *,
    feed: Mapping[str, NDArray[Any]] | None = None,
    save_inputs_path: Path | None = None,
    save_outputs_path: Path | None = None,
) -> PolygraphyFigures:
    """Run both sessions through Polygraphy's Comparator on one window.

    Polygraphy's pass or fail is not used, only its figures: the gates are in `report`.

    Args:
        reference: The model to be reproduced.
        candidate: The model to be judged.
        window: int64 [S], S >= 1. Some 64 tokens are enough: the figures hardly depend on it, time and files do.
        feed: What `save_inputs_path` is to hold: every input of the candidate's graph for this window, as
            `OnnxCausalSession.prefill_feed` gives it. Only `input_ids` when None.
        save_inputs_path: Write the feed in Polygraphy's JSON format (`--load-inputs`); ends in `.json`.
        save_outputs_path: Write the reference's logits likewise (`--load-outputs`); 5.4 x S x V bytes.

    Raises:
        UserError: The outputs cannot be compared, or the feed has a dtype that Polygraphy's files cannot hold.
    """
    feed = {"input_ids": window[None]} if feed is None else feed
    if save_inputs_path is not None:
        _check_feed(feed)
    runners = [
        CausalRunner(reference, f"reference: {reference.name}"),
        CausalRunner(candidate, f"candidate: {candidate.name}"),
    ]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        with nullcontext() if save_inputs_path is None else atomic_path(save_inputs_path) as partial:
            results = Comparator.run(runners, data_loader=[feed], save_inputs_path=partial and str(partial))
        if save_outputs_path is not None:
            with atomic_path(save_outputs_path) as partial:
                RunResults([(runners[0].name, results[runners[0].name])]).save(str(partial))
        return _figures(results, len(window))


def diff_logits(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> PolygraphyFigures:
    """Polygraphy's figures of logits that are there already, [T, V] and [T, V].

    Raises:
        UserError: The shapes differ, or a value is NaN or infinite.
    """
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = RunResults([_result("reference", reference), _result("candidate", candidate)])
        return _figures(results, len(reference))


def save_outputs(logits: NDArray[Any], name: str, path: Path) -> None:
    """Write logits [B, S, V] as the output of a runner called `name`, for Polygraphy's `--load-outputs`; `.json`."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), atomic_path(path) as partial:
        RunResults([_result(name, logits)]).save(str(partial))


def save_arrays(feed: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Write the inputs of one call for Polygraphy's `--load-inputs`; `.json`.

    Raises:
        UserError: One has a dtype that Polygraphy's files cannot hold.
    """
    _check_feed(feed)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), atomic_path(path) as partial:
        save_json([OrderedDict(feed)], str(partial))


def _result(name: str, logits: NDArray[Any]) -> tuple[str, list[IterationResult]]:
    return name, [IterationResult({_OUTPUT: logits}, runtime=0.0, runner_name=name)]


def _figures(results: RunResults, tokens: int) -> PolygraphyFigures:
    cosine, psnr, l2 = _metrics(results)
    if math.isnan(cosine) or math.isnan(psnr) or math.isnan(l2):
        names = ", ".join(name for name, _ in results)
        raise UserError(names, "logits are NaN or infinite", "verify them one by one")
    return PolygraphyFigures(
        version=polygraphy.__version__,
        tokens=tokens,
        cosine_similarity=cosine,
        psnr_db=psnr,
        l2_norm=l2,
    )


def _metrics(results: RunResults) -> tuple[float, float, float]:
    """Cosine similarity, PSNR and L2 norm of the first runner's logits against the second's."""
    functions = [CosineSimilarityCompareFunc(), PsnrCompareFunc(), L2CompareFunc()]
    compared = Comparator.compare_accuracy(results, compare_func=functions)
    pair = (results[0][0], results[1][0])
    cosine, psnr, l2 = (accuracy[pair][0][_OUTPUT] for accuracy in compared)
    if isinstance(cosine, bool):  # Polygraphy's answer to shapes that differ
        shapes = [tuple(results[index][1][0][_OUTPUT].shape) for index in (0, 1)]
        raise UserError(
            " and ".join(pair),
            f"logits of shapes {shapes[0]} and {shapes[1]} cannot be compared",
            "compare a model with its own export",
        )
    return cosine.cosine_similarity, psnr.psnr, l2.l2_norm


def _check_feed(feed: Mapping[str, NDArray[Any]]) -> None:
    for name, array in feed.items():
        if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
            raise UserError(
                f"input {name}", f"Polygraphy's files cannot hold {array.dtype}", "use an FP16 or FP32 graph"
            )

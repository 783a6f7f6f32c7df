"""Calibration in several processes: rank 0 runs the road; the others wait until it calibrates, and take their share."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import TypeAdapter

from calib.batches import TokenBatches
from calib.ranks import Ranks
from fptq_export.pipeline.calibration import Job, measure
from fptq_export.pipeline.models import RunModels
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.progress import NoProgress

__all__ = ["serve"]


def serve(ranks: Ranks) -> None:
    """Do what rank 0 offers, once.

    Raises:
        AnotherRankError: Another rank failed.
        FptqError: This one did.
    """
    job = TypeAdapter(Job | None).validate_json(ranks.receive())
    if job is None:
        return
    tokens = torch.zeros(job.shape, dtype=torch.int64)
    ranks.broadcast_(tokens)
    batches = TokenBatches(np.asarray(tokens), job.description, job.sha256)
    progress = NoProgress()
    with ranks.together():
        checkpoint = RunModels(job.options, RunDirectory(job.options.output), progress).quantized
    measure(job, checkpoint, batches, ranks, progress)

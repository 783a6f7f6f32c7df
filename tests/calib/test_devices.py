"""The device is the one that was asked for, or a clear refusal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calib.batches import CalibrationOptions, token_batches
from calib.devices import CPU, device_from_option
from calib.load import Checkpoint, model_from_checkpoint
from calib.observe import Execution, HessianSink, observe
from calib.stats import Stats
from fptq_export.errors import UserError
from fptq_export.progress import NoProgress
from fptq_export.sites import Sites

WINDOWS, SEQ = 3, 16
GPU_TOLERANCE = 2.0**-24 * 4096
"""Relative: sums of a few hundred terms in another order, through two layers; a thousandth would be another model."""


def see_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the CPU where there is none."""
    see_gpus(monkeypatch, 0)
    assert device_from_option("auto") == CPU
    see_gpus(monkeypatch, 1)
    assert device_from_option("auto") == torch.device("cuda", 0)


def test_named_devices_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cpu` stays the CPU beside GPUs; a number is that GPU; each process of a machine has its own."""
    see_gpus(monkeypatch, 4)
    assert device_from_option("cpu", local_rank=1, local_size=4) == CPU
    assert device_from_option("cuda:3") == torch.device("cuda", 3)
    assert [device_from_option("cuda", rank, 4).index for rank in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("gpus", "option", "rank", "size", "cause"),
    [
        (0, "cuda", 0, 1, "sees no GPU"),
        (0, "cuda:0", 0, 1, "sees no GPU"),
        (1, "cuda:1", 0, 1, "has 1 GPU, and GPU 1"),
        (2, "cuda", 2, 4, "has 2 GPUs, and GPU 2"),
        (1, "auto", 1, 2, "has 1 GPU, and GPU 1"),
        (4, "cuda:1", 0, 2, "2 processes of this machine would share one GPU"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, gpus: int, option: str, rank: int, size: int, cause: str
) -> None:
    """No silent step back to the CPU, and no GPU that two processes share."""
    see_gpus(monkeypatch, gpus)
    with pytest.raises(UserError, match=cause) as error:
        device_from_option(option, rank, size)
    assert error.value.where == f"--device {option}"


@pytest.mark.gpu
def test_a_gpu_measures_what_the_cpu_measures(llama: Checkpoint, sites: Sites) -> None:
    """Maxima and Hessians of the GPU are those of the CPU, up to the order of sums."""
    paths = [linear.path for linear in sites.linears]
    batches = token_batches(CalibrationOptions(dataset="random", size=WINDOWS, seq=SEQ), None, 512)

    def measured(device: torch.device) -> tuple[Stats, dict[str, torch.Tensor]]:
        matrices: dict[str, torch.Tensor] = {}
        sink = HessianSink({path: path for path in paths}, matrices.__setitem__)
        execution = Execution(device=device)
        stats = observe(
            lambda: model_from_checkpoint(llama, torch.float32), batches, paths, NoProgress(), 2, sink, execution
        )
        return stats, matrices

    on_cpu, cpu_matrices = measured(CPU)
    on_gpu, gpu_matrices = measured(torch.device("cuda", 0))
    for path in paths:
        absmax = on_cpu.channel_absmax[path]
        assert np.abs(on_gpu.channel_absmax[path] - absmax).max() <= GPU_TOLERANCE * absmax.max(), path
        hessian = cpu_matrices[path]
        assert gpu_matrices[path].device == CPU
        assert (gpu_matrices[path] - hessian).abs().max() <= GPU_TOLERANCE * hessian.abs().max(), path

"""The worker alone, spoken to as `engine` does."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from fptq_export.build.profiles import Profile, ShapeRange
from fptq_export.build.protocol import (
    Built,
    Failed,
    Job,
    Progressed,
    event_from_line,
    job_from_line,
    line_from_event,
    line_from_job,
)
from fptq_export.build.targets import Target
from fptq_export.build.tensorrt import tensorrt_for_target
from fptq_export.build.worker import configured
from fptq_export.errors import UserError

if TYPE_CHECKING:
    from tests.build.conftest import LoweredGraph, Recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(make_graph: Callable[[Recipe], LoweredGraph], make_recipe: type[Recipe], tmp_path: Path) -> Job:
    """A job that builds in a second."""
    graph = make_graph(make_recipe())
    profile = Profile((ShapeRange("x", (1, 1, 256), (1, 4, 256), (1, 8, 256)),))
    return Job(
        Target.TENSORRT_RTX, graph.path, graph.path, tmp_path / "engine", tmp_path / "log", (profile,), (), None, {}
    )


def start() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fptq_export.build.worker"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, cwd=ROOT)


def events_of(process: subprocess.Popen[bytes], job: Job) -> list[Built | Failed | Progressed]:
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line_from_job(job))
        process.stdin.flush()
        return [event_from_line(line) for line in process.stdout]


def test_job_and_events_survive_the_pipe(job: Job) -> None:
    """What is read is what was sent, shapes, paths and all."""
    assert job_from_line(line_from_job(job)) == job
    for event in (Progressed(0.25), Failed("a", "b\nc", ""), Built(1, "1.7", 2)):
        assert event_from_line(line_from_event(event)) == event
        assert line_from_event(event).count(b"\n") == 1


def test_options_reach_the_configuration(job: Job) -> None:
    """Level, pools and compute capabilities of a job are what the builder is configured with; none is dropped."""
    trt = tensorrt_for_target(Target.TENSORRT_RTX)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    options: dict[str, Any] = {
        "optimization_level": 1,
        "memory_pools": {"WORKSPACE": 1 << 28},
        "compute_capabilities": ("8.9", "12.0"),
    }
    config = configured(trt, builder, dataclasses.replace(job, **options))
    assert config.builder_optimization_level == 1
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 28
    capabilities = [config.get_compute_capability(index) for index in range(config.num_compute_capabilities)]
    assert capabilities == [trt.ComputeCapability.SM89, trt.ComputeCapability.SM120]


def test_pool_unknown_to_the_library_is_refused(job: Job) -> None:
    """A limit that this version cannot set is an error, not a limit that is not there."""
    trt = tensorrt_for_target(Target.TENSORRT_RTX)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    with pytest.raises(UserError, match="has no pool L3"):
        configured(trt, builder, dataclasses.replace(job, memory_pools={"L3": 1}))


def test_compute_capability_of_a_library_without_them_is_refused(job: Job) -> None:
    """TensorRT proper builds for the GPU it sees; a capability asked of it must not be ignored."""
    trt = SimpleNamespace(__name__="tensorrt", ProfilingVerbosity=SimpleNamespace(DETAILED=2))
    builder = SimpleNamespace(create_builder_config=lambda: SimpleNamespace())
    with pytest.raises(UserError, match="builds for the GPU of this machine only"):
        configured(trt, builder, dataclasses.replace(job, compute_capabilities=("8.9",)))


def test_standard_output_holds_events_only(job: Job) -> None:
    """Every line is an event although TensorRT's C++ side prints as well, and the last one is the result."""
    *progress, last = events_of(start(), job)
    assert isinstance(last, Built)
    assert all(isinstance(event, Progressed) for event in progress)
    assert progress[-1] == Progressed(1.0)
    assert job.engine_path.stat().st_size == last.engine_bytes


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full to simulate a full disk")
def test_full_disk_is_a_user_error(job: Job) -> None:
    """No space for the engine: the person gets a sentence, not a traceback."""
    full = dataclasses.replace(job, engine_path=Path("/dev/full"))
    last = events_of(start(), full)[-1]
    assert isinstance(last, Failed)
    assert last.cause == "the disk is full"


def test_end_of_input_ends_the_worker(job: Job) -> None:
    """A worker whose parent is gone stops in the middle of its work."""
    with start() as process:
        assert process.stdin is not None
        process.stdin.write(line_from_job(job))
        process.stdin.close()
        assert process.wait(timeout=60) != 0
    assert not job.engine_path.exists()

"""The process that runs TensorRT: it may abort, be killed or print what it likes without harm to the command.

Run as `python -m fptq_export.build.worker` by `engine.build_engine`; see `protocol` for what goes in and out. Standard
error is the log file; what TensorRT's C++ side prints to standard output goes there too.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from fptq_export.build.builder_log import text_from_message
from fptq_export.build.deserialize import load_plugins
from fptq_export.build.embedded_plugin import check_embedded, embed_plugin
from fptq_export.build.phases import PhaseProgress
from fptq_export.build.protocol import Built, Failed, Job, Progressed, job_from_line, line_from_event
from fptq_export.build.tensorrt import tensorrt_for_target
from fptq_export.errors import UserError
from fptq_export.files import user_error_from_os_error

__all__ = ["configured", "main"]

_REPORT_SECONDS = 0.1
"""Least time between two progress events, so that thousands of steps do not flood the pipe."""

_SHOWN_PARSE_ERRORS = 20
_JOB_FD = 0
_LOG_FD = 2


def main() -> int:
    """Build what standard input asks for. 0 when a result, good or bad, was sent."""
    events = _take_standard_output()
    job = job_from_line(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        result: Built | Failed = _build(job, events)
    except UserError as error:
        result = Failed(error.where, error.cause, error.hint)
    except OSError as error:
        mended = user_error_from_os_error(error)
        if mended is None:
            raise
        result = Failed(mended.where, mended.cause, mended.hint)
    events.write(line_from_event(result))
    return 0


def _take_standard_output() -> BinaryIO:
    """Keep the pipe to the parent for events; point file descriptor 1, which C++ prints to, at the log."""
    events = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(_LOG_FD, 1)
    return events


def _end_with_parent() -> None:
    """End the process when standard input does: a build nobody waits for must not go on."""
    # Not through sys.stdin: a thread that holds its lock makes the interpreter abort at exit.
    while os.read(_JOB_FD, 1):
        pass
    os._exit(1)


def _build(job: Job, events: BinaryIO) -> Built:
    trt = tensorrt_for_target(job.target)
    logger = _logger(trt)
    builder = trt.Builder(logger)
    if job.plugin_library is not None:
        load_plugins(trt, job.plugin_library)
    config = configured(trt, builder, job)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(job.onnx_path.read_bytes(), path=str(job.weights_path)):
        raise _parse_error(parser, job)
    _add_profiles(builder, config, job)
    config.progress_monitor = _progress_monitor(trt, events)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError(str(job.onnx_path), "TensorRT could not build an engine", "")
    with job.engine_path.open("wb") as file:
        file.write(memoryview(engine))
    if job.embed_plugin and job.plugin_library is not None:
        check_embedded(trt, job.engine_path, job.plugin_library)
    return Built(job.engine_path.stat().st_size, str(trt.__version__), _peak_memory_bytes())


def configured(trt: Any, builder: Any, job: Job) -> Any:
    """Builder configuration of a job. Raises UserError for what this version of the library does not know."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job.optimization_level is not None:
        config.builder_optimization_level = job.optimization_level
    for name, limit in job.memory_pools.items():
        pool = trt.MemoryPoolType.__members__.get(name)
        if pool is None:
            raise UserError("--memPoolSize", f"{trt.__name__} {trt.__version__} has no pool {name}", "leave it out")
        config.set_memory_pool_limit(pool, limit)
    if job.compute_capabilities:
        _set_compute_capabilities(trt, config, job.compute_capabilities)
    if job.embed_plugin and job.plugin_library is not None:
        embed_plugin(trt, config, job.plugin_library)
    return config


def _set_compute_capabilities(trt: Any, config: Any, wanted: tuple[str, ...]) -> None:
    if not hasattr(config, "set_compute_capability"):
        cause = f"{trt.__name__} builds for the GPU of this machine only"
        raise UserError("--compute-capability", cause, "leave it out, or use --target tensorrt-rtx")
    members = trt.ComputeCapability.__members__
    known = {f"{name[2:-1]}.{name[-1]}": member for name, member in members.items() if name.startswith("SM")}
    unknown = [text for text in wanted if text not in known]
    if unknown:
        cause = f"{trt.__name__} {trt.__version__} does not build for {', '.join(unknown)}"
        raise UserError("--compute-capability", cause, f"choose from: {' '.join(known)}")
    config.num_compute_capabilities = len(wanted)
    for index, text in enumerate(wanted):
        config.set_compute_capability(known[text], index)


def _add_profiles(builder: Any, config: Any, job: Job) -> None:
    for index, profile in enumerate(job.profiles):
        shapes = builder.create_optimization_profile()
        for item in profile.ranges:
            shapes.set_shape(item.name, item.minimum, item.optimum, item.maximum)
        if config.add_optimization_profile(shapes) < 0:
            raise UserError("optimization profile", f"TensorRT refuses profile {index}", "")


def _parse_error(parser: Any, job: Job) -> UserError:
    errors = [_text_from_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
    shown = errors[:_SHOWN_PARSE_ERRORS]
    if len(errors) > len(shown):
        shown.append(f"and {len(errors) - len(shown)} more")
    cause = "TensorRT cannot parse the graph:" + "".join(f"\n  {error}" for error in shown)
    return UserError(str(job.onnx_path), cause, f"the builder's log is {job.log_path}")


def _text_from_parser_error(error: Any) -> str:
    node, reason = error.node_name(), error.desc()
    place = f"node {node} ({error.node_operator()}): " if node else ""
    # "false" is the text of an assertion that always fails: the code alone says it.
    return f"{place}{error.code().name}" + ("" if reason == "false" else f": {reason}")


def _logger(trt: Any) -> Any:
    class LogFile(trt.ILogger):  # type: ignore[misc] # the library has no types
        """Everything TensorRT says, written at once: what was said before a crash must be in the file."""

        def log(self, severity: Any, message: str) -> None:
            os.write(_LOG_FD, text_from_message(int(severity), message).encode("utf-8", errors="replace"))

    return LogFile()


def _progress_monitor(trt: Any, events: BinaryIO) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc] # the library has no types
        """Sends the fraction that is done, now and then and at the end."""

        def __init__(self) -> None:
            super().__init__()
            self._phases = PhaseProgress()
            self._next = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases.start(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            self._phases.finish(phase_name)
            self._send(at_once=self._phases.fraction() == 1.0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._phases.complete_step(phase_name, step)
            self._send(at_once=False)
            return True

        def _send(self, at_once: bool) -> None:
            now = time.monotonic()
            if at_once or now >= self._next:
                self._next = now + _REPORT_SECONDS
                events.write(line_from_event(Progressed(self._phases.fraction())))

    return Monitor()


def _peak_memory_bytes() -> int:
    """Largest resident size of this process.

    Linux: VmHWM. `getrusage` would count the parent's size too, which exec passes on.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        (kib,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(kib) * 1024
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


if __name__ == "__main__":
    # The result is sent: a library that crashes while it is unloaded must not turn it into a failure.
    os._exit(main())

"""From the lowered graph to an engine that is published only after its precision is proven."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from fptq_export.build.builder_log import last_lines_from_log, messages_from_log
from fptq_export.build.findings import refuse_problems
from fptq_export.build.int8_convolutions import Int8Convolution, float_convolutions
from fptq_export.build.layer_list import EngineLayer, PrecisionReport, layers_from_log, precision_report
from fptq_export.build.loader_path import loader_environment
from fptq_export.build.memory_pools import MEMORY_POOLS
from fptq_export.build.profiles import Profile, check_profiles, inputs_from_graph
from fptq_export.build.proof import Expected, find_all
from fptq_export.build.protocol import Built, Failed, Job, Progressed, event_from_line, line_from_job
from fptq_export.build.targets import Target, check_target, module_name
from fptq_export.errors import FptqError, Problem, UserError, UserErrors
from fptq_export.files import PARTIAL_SUFFIX, atomic_path, user_error_from_os_error
from fptq_export.graph_io import load_graph
from fptq_export.progress import Progress, Task

__all__ = [
    "DEFAULT_COMPUTE_CAPABILITIES",
    "BuildReport",
    "BuildRequest",
    "build_engine",
    "environment_of_worker",
    "expected_from_request",
]

DEFAULT_COMPUTE_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
"""What a TensorRT for RTX engine is built for unless the user says otherwise."""

_WORKER = "fptq_export.build.worker"
_OPTIMIZATION_LEVELS = range(6)
_SHOWN_ERRORS = 5
_SHOWN_CHARACTERS = 500
"""Of each error; Myelin's may run to pages."""


@dataclass(frozen=True)
class BuildRequest:
    """What to build."""

    onnx_path: Path
    """The lowered graph."""
    weights_dir: Path
    """Directory in which the locations of the graph's external data are looked up."""
    engine_path: Path
    log_path: Path
    """Where the builder's VERBOSE log is kept, whether the build succeeds or not."""
    target: Target
    quantized: Mapping[str, int]
    """Number of INT4 codes (in x out, padding of packed weights included) of each quantized linear, by torch path;
    linears that were fused are one, by their common path."""
    int8: Mapping[str, int] = field(default_factory=dict)
    """Number of INT8 codes (in x out) of each `w8a8` linear, by torch path."""
    convolutions: Mapping[str, Int8Convolution] = field(default_factory=dict)
    """The `w8a8` convolutions, by path."""
    profiles: tuple[Profile, ...] = ()
    compute_capabilities: tuple[str, ...] = ()
    """`8.9`, `12.0`, ...; empty is the library's own choice, and all that `tensorrt` takes."""
    optimization_level: int | None = None
    """0 to 5; None is the library's own choice."""
    memory_pools: Mapping[str, int] = field(default_factory=dict)
    """Bytes by trtexec's pool name, from `mem_pools_from_option`."""
    plugin: Mapping[str, str] = field(default_factory=dict)
    """Operator of each linear that the plugin runs, by path."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Common path of fused linears -> their torch paths."""
    plugin_library: Path | None = None
    """The library with the plugin; needed where `plugin` is not empty."""
    embed_plugin: bool = False
    """Whether the engine is to carry that library, and so to load without it."""


@dataclass(frozen=True)
class BuildReport:
    """What was built."""

    target: Target
    library_version: str
    compute_capabilities: tuple[str, ...]
    engine_bytes: int
    seconds: float
    peak_memory_bytes: int
    """Largest resident size of the process that ran TensorRT."""
    layers: tuple[EngineLayer, ...]
    precision: PrecisionReport
    float_convolutions: tuple[str, ...]
    """Quantized convolutions that multiply in float what their INT8 codes say, for want of a kernel."""
    warnings: tuple[str, ...]


def build_engine(request: BuildRequest, progress: Progress) -> BuildReport:
    """Build an engine in a process of its own, check its layers against the policy, and only then give it its name.

    Raises:
        UserError: The target cannot be built here, a file is missing or cannot be written, TensorRT refuses the graph,
            or the worker was killed.
        UserErrors: Options or profiles that do not fit.
        PrecisionError: The engine does not run what the policy says.
        FptqError: The worker failed in a way that is not the user's to mend.
    """
    check_target(request.target)
    _check_request(request)
    _check_graph(request)
    _check_writable(request.engine_path)
    _check_writable(request.log_path)
    started = time.monotonic()
    with atomic_path(request.engine_path) as partial:
        built = _run_job(_job_from_request(request, partial), request.log_path, progress)
        layers = layers_from_log(request.log_path)
        expected = expected_from_request(request)
        holders, problems = find_all(layers, expected)
        refuse_problems(problems)
    return BuildReport(
        target=request.target,
        library_version=built.library_version,
        compute_capabilities=request.compute_capabilities,
        engine_bytes=built.engine_bytes,
        seconds=time.monotonic() - started,
        peak_memory_bytes=built.peak_memory_bytes,
        layers=layers,
        precision=precision_report(layers, holders, expected.int4, expected.profiles, expected.plugin, expected.fused),
        float_convolutions=float_convolutions(holders, expected.convolutions),
        warnings=tuple(messages_from_log(request.log_path, "W")),
    )


def expected_from_request(request: BuildRequest) -> Expected:
    """What the layers of the engine must show."""
    return Expected(
        int4=dict(request.quantized),
        int8=dict(request.int8),
        convolutions=dict(request.convolutions),
        plugin=dict(request.plugin),
        fused=dict(request.fused),
        profiles=max(1, len(request.profiles)),
    )


def _check_request(request: BuildRequest) -> None:
    problems = [
        Problem("--compute-capability", f"{text!r} is not of the form major.minor, e.g. 8.9")
        for text in request.compute_capabilities
        if re.fullmatch(r"\d+\.\d", text) is None
    ]
    level = request.optimization_level
    if level is not None and level not in _OPTIMIZATION_LEVELS:
        problems.append(Problem("--builderOptimizationLevel", f"{level} is not between 0 and 5"))
    problems += [
        Problem("--memPoolSize", f"{name!r} is not a memory pool ({', '.join(MEMORY_POOLS)})")
        for name in request.memory_pools
        if name not in MEMORY_POOLS
    ]
    if request.embed_plugin and request.plugin_library is None:
        problems.append(Problem("--embed-plugin", "no library is given that the engine could carry"))
    if module_name(request.target) is None:
        problems.append(Problem("--target", f"{request.target} has no engine"))
    if problems:
        raise UserErrors("build options", problems, "mend every option listed above and run again")


def _check_graph(request: BuildRequest) -> None:
    """Check what TensorRT reports unclearly or not at all: no outputs, missing weights, profiles that do not fit."""
    model = load_graph(request.onnx_path)
    where = str(request.onnx_path)
    if not model.graph.outputs:
        raise UserError(where, "the graph has no outputs, so this is not an exported model", "export the model again")
    problems = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        data = request.weights_dir / str(tensor.location)
        end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if not data.is_file():
            problems.append(Problem(tensor.name or "", f"its data file {data} is missing"))
        elif data.stat().st_size < end:
            problems.append(Problem(tensor.name or "", f"its data file {data} ends before byte {end}"))
    if problems:
        raise UserErrors(where, problems, "run the stage that writes the weights again")
    check_profiles(request.profiles, inputs_from_graph(model.graph, where))


def _check_writable(path: Path) -> None:
    """Fail now, not after minutes of building. Raises UserError when `path` cannot be created."""
    probe = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))
        probe.touch()
        probe.unlink()
    except OSError as error:
        known = user_error_from_os_error(error)
        raise known or UserError(str(path), f"cannot be written ({error.strerror})", "choose another path") from error


def _job_from_request(request: BuildRequest, engine_path: Path) -> Job:
    return Job(
        target=request.target,
        onnx_path=request.onnx_path.absolute(),
        weights_path=request.weights_dir.absolute() / request.onnx_path.name,
        engine_path=engine_path.absolute(),
        log_path=request.log_path,
        profiles=request.profiles,
        compute_capabilities=request.compute_capabilities,
        optimization_level=request.optimization_level,
        memory_pools={MEMORY_POOLS[name]: limit for name, limit in request.memory_pools.items()},
        plugin_library=request.plugin_library.absolute() if request.plugin_library is not None else None,
        embed_plugin=request.embed_plugin,
    )


def _run_job(job: Job, log_path: Path, progress: Progress) -> Built:
    """Have a worker do the job. Raises what `build_engine` raises when it does not get done."""
    with ExitStack() as stack:
        loader = stack.enter_context(loader_environment(job.target)) if job.plugin_library is not None else {}
        log = stack.enter_context(_kept_log(log_path))
        task = stack.enter_context(progress.task("Building the engine", total=100.0))
        outcome = _outcome_of_worker(job, log, task, loader)
    if isinstance(outcome, Built):
        return outcome
    errors = [text[:_SHOWN_CHARACTERS] for text in messages_from_log(log_path, "FE")][-_SHOWN_ERRORS:]
    said = "".join(f"\n  {text}" for text in errors)
    hint = f"the builder's log is {log_path}"
    if isinstance(outcome, Failed):
        if outcome.hint:
            raise UserError(outcome.where, outcome.cause, outcome.hint)
        raise UserError(outcome.where, outcome.cause + said, hint)
    if outcome < 0:
        name = signal.Signals(-outcome).name
        if name == "SIGKILL":
            hint = f"the system may be out of memory: lower --max-batch-size, --max-input-len or --max-kv-len; {hint}"
        raise UserError(str(job.onnx_path), f"the process that ran TensorRT was ended by {name}{said}", hint)
    tail = "".join(f"\n  {line}" for line in last_lines_from_log(log_path, _SHOWN_ERRORS))
    raise FptqError(f"the process that ran TensorRT ended with code {outcome}; {hint}{tail}")


def _outcome_of_worker(job: Job, log: BinaryIO, task: Task, loader: Mapping[str, str]) -> Built | Failed | int:
    """What the worker sent last, or its exit code when it sent no result. `loader` is added to its environment."""
    process = subprocess.Popen(
        [sys.executable, "-m", _WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**environment_of_worker(), **loader},
        # Ctrl-C goes to this process alone, which then ends the worker: TensorRT aborts when a callback raises.
        start_new_session=True,
    )
    result: Built | Failed | None = None
    with process:
        try:
            _send_job(process, job)
            assert process.stdout is not None
            for line in process.stdout:
                event = event_from_line(line)
                if isinstance(event, Progressed):
                    task.update(100.0 * event.fraction)
                else:
                    result = event
            code = process.wait()
        finally:
            process.kill()
    return result if result is not None and code == 0 else code


def _send_job(process: subprocess.Popen[bytes], job: Job) -> None:
    """Send the job and leave the pipe open; a worker that is dead by now is found out by its exit code."""
    assert process.stdin is not None
    try:
        process.stdin.write(line_from_job(job))
        process.stdin.flush()
    except BrokenPipeError:
        with suppress(BrokenPipeError):
            process.stdin.close()


def environment_of_worker() -> dict[str, str]:
    """This process's environment, with this package importable and the working directory not searched for modules."""
    package_root = str(Path(__file__).resolve().parents[2])
    search = [package_root, os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(part for part in search if part),
        "PYTHONSAFEPATH": "1",
    }


@contextmanager
def _kept_log(path: Path) -> Iterator[BinaryIO]:
    """Open a log under a temporary name; it gets its own name at the end, also when the block fails."""
    partial = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    try:
        with partial.open("wb") as file:
            yield file
    finally:
        partial.replace(path)

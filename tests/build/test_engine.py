"""Real builds with TensorRT for RTX, which needs no GPU for them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from fptq_export.build.engine import DEFAULT_COMPUTE_CAPABILITIES, build_engine
from fptq_export.build.profiles import Profile, ShapeRange
from fptq_export.build.targets import Target
from fptq_export.errors import ExitCode, FptqError, PrecisionError, UserError, UserErrors
from fptq_export.progress import NoProgress

if TYPE_CHECKING:
    from fptq_export.build.engine import BuildRequest
    from tests.build.conftest import Recipe, Recorder

    MakeRequest = Callable[..., BuildRequest]

pytestmark = pytest.mark.skipif(
    sys.platform == "darwin", reason="TensorRT for RTX has wheels for Linux and Windows on x86-64 only"
)

Q, K, V = "layer.q_proj", "layer.k_proj", "layer.v_proj"
CODES = 256 * 128


def files_of(request: BuildRequest) -> set[str]:
    """What a build left where its engine goes."""
    folder = request.engine_path.parent
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_static_and_per_token_linears_build(make_request: MakeRequest, make_recipe: type[Recipe]) -> None:
    """Both kinds of activation give an engine whose every linear is 4-bit, and the report says what was built."""
    request = make_request(
        make_recipe({Q: False, K: False, V: True}), compute_capabilities=DEFAULT_COMPUTE_CAPABILITIES
    )
    report = build_engine(request, NoProgress())
    assert request.engine_path.stat().st_size == report.engine_bytes
    assert files_of(request) == {"out.plan"}
    assert report.precision.int4_constants == 3
    assert report.precision.unfused == ()
    assert report.compute_capabilities == ("8.0", "8.6", "8.9", "12.0")
    assert report.library_version.startswith("1.")
    assert report.seconds > 0
    assert 50e6 < report.peak_memory_bytes < 2e9


def test_engine_is_small_because_weights_stay_4_bit(make_request: MakeRequest, make_recipe: type[Recipe]) -> None:
    """Eight times the weights add 4 bits and a scale for each, not 16: the engine holds INT4."""
    small = build_engine(make_request(make_recipe({Q: False})), NoProgress())
    wide_recipe = make_recipe({Q: False}, out_features=4096)
    large = build_engine(make_request(wide_recipe), NoProgress())
    added = (4096 - 128) * 256
    assert 0.5 * added < large.engine_bytes - small.engine_bytes < 0.75 * added


def test_progress_reaches_the_end(make_request: MakeRequest, recorder: Recorder) -> None:
    """TensorRT's phases arrive as a bar that never falls and ends at 100."""
    build_engine(make_request(), recorder)
    assert recorder.seen[-1] == 100.0
    assert recorder.seen == sorted(recorder.seen)


def test_log_is_kept_with_the_layer_list(make_request: MakeRequest) -> None:
    """Who wants to check the proof finds the builder's own words."""
    request = make_request()
    build_engine(request, NoProgress())
    assert "[V] Layers:\n" in request.log_path.read_text(encoding="utf-8")


def test_two_profiles_are_proven_in_both(make_request: MakeRequest, make_recipe: type[Recipe]) -> None:
    """Each profile's copy of a linear is checked."""
    ranges = [((1, 1, 256), (1, 4, 256), (1, 8, 256)), ((1, 1, 256),) * 3]
    profiles = tuple(Profile((ShapeRange("x", *sizes),)) for sizes in ranges)
    report = build_engine(make_request(make_recipe({Q: False}), profiles=profiles), NoProgress())
    assert report.precision.profiles == 2
    assert report.precision.int4_constants == 2


def test_static_graph_builds_without_profile(make_request: MakeRequest, make_recipe: type[Recipe]) -> None:
    """A graph with fixed shapes needs no profile."""
    report = build_engine(make_request(make_recipe({Q: True}, dims=(1, 4))), NoProgress())
    assert report.precision.quantized_linears == 1


def test_weights_may_lie_elsewhere_than_the_graph(make_request: MakeRequest, tmp_path: Path) -> None:
    """External data is looked up in weights_dir: the lowered graph is a scratch file, its weights stay in place."""
    request = make_request()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    moved = request.onnx_path.rename(scratch / "other.onnx")
    build_engine(dataclasses.replace(request, onnx_path=moved), NoProgress())
    assert request.engine_path.is_file()


def test_forbidden_fusion_publishes_no_engine(make_request: MakeRequest, make_recipe: type[Recipe]) -> None:
    """Without the barrier TensorRT builds a wrong engine silently; it never gets the final name."""
    request = make_request(make_recipe({Q: False}, dims=("tokens",), barrier=False))
    with pytest.raises(PrecisionError, match="unpacks its INT4 codes to INT8") as caught:
        build_engine(request, NoProgress())
    assert caught.value.exit_code == ExitCode.PRECISION_PROOF
    assert files_of(request) == set()


def test_policy_mismatch_keeps_the_old_engine(make_request: MakeRequest) -> None:
    """An engine that fails its proof does not replace the one that passed before."""
    request = make_request()
    request.engine_path.parent.mkdir()
    request.engine_path.write_bytes(b"old")
    missing = dataclasses.replace(request, quantized={**request.quantized, "layer.o_proj": CODES})
    with pytest.raises(PrecisionError, match=r"layer\.o_proj"):
        build_engine(missing, NoProgress())
    assert request.engine_path.read_bytes() == b"old"
    assert files_of(request) == {"out.plan"}


def test_failed_build_says_what_tensorrt_said(make_request: MakeRequest, make_recipe: type[Recipe]) -> None:
    """When the builder gives up, its last errors and the log are in the message; its C++ prints do no harm."""
    request = make_request(make_recipe({Q: False}, barrier=False))
    with pytest.raises(UserError, match="MyelinCheckException") as caught:
        build_engine(request, NoProgress())
    assert str(request.log_path) in caught.value.hint
    assert "Internal Error" in request.log_path.read_text(encoding="utf-8")
    assert files_of(request) == set()


def test_unsupported_node_is_named(make_request: MakeRequest) -> None:
    """A parser error gives the node, its operator and the reason."""
    request = make_request()
    values = [helper.make_tensor_value_info(name, TensorProto.INT8, [2, 2]) for name in "ab"]
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"], name="layer.odd/MatMulInteger")
    output = helper.make_tensor_value_info("y", TensorProto.INT32, [2, 2])
    graph = helper.make_graph([node], "g", values, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), request.onnx_path)
    with pytest.raises(UserError, match=r"node layer\.odd/MatMulInteger \(MatMulInteger\): UNSUPPORTED_NODE\n"):
        build_engine(dataclasses.replace(request, profiles=()), NoProgress())


@pytest.mark.parametrize("content", [b"", b"hello", b"\x08\x0a\x12"])
def test_broken_graph_is_refused(make_request: MakeRequest, content: bytes) -> None:
    """Bytes that are no model: the parser of TensorRT would take some of them for an empty network."""
    request = make_request()
    request.onnx_path.write_bytes(content)
    with pytest.raises(UserError, match=r"lowered\.onnx"):
        build_engine(request, NoProgress())
    assert children() == []


def test_truncated_graph_is_refused(make_request: MakeRequest) -> None:
    """A graph file cut in half."""
    request = make_request()
    content = request.onnx_path.read_bytes()
    request.onnx_path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"lowered\.onnx"):
        build_engine(request, NoProgress())


def test_missing_weights_are_all_named(make_request: MakeRequest, tmp_path: Path) -> None:
    """Every tensor whose data file is not there, before the builder starts."""
    request = make_request()
    (tmp_path / "weights.data").unlink()
    with pytest.raises(UserErrors, match="is missing") as caught:
        build_engine(request, NoProgress())
    paths = {problem.path for problem in caught.value.problems}
    assert {f"{Q}.weight_codes", f"{K}.weight_codes"} <= paths


def test_truncated_weights_are_refused(make_request: MakeRequest, tmp_path: Path) -> None:
    """A data file that ends early must not be read past its end."""
    request = make_request()
    with (tmp_path / "weights.data").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(UserErrors, match="ends before byte"):
        build_engine(request, NoProgress())


def test_profile_that_changes_a_static_dimension_is_refused(make_request: MakeRequest) -> None:
    """The hidden size is fixed by the graph."""
    wrong = Profile((ShapeRange("x", (1, 1, 128), (1, 1, 128), (1, 1, 128)),))
    with pytest.raises(UserErrors, match="fixes this dimension to 256, not 128"):
        build_engine(make_request(profiles=(wrong,)), NoProgress())


def test_unknown_compute_capability_names_the_known_ones(make_request: MakeRequest) -> None:
    """H100 is no target of TensorRT for RTX: say so, and what is."""
    request = make_request(compute_capabilities=("8.9", "9.0"))
    with pytest.raises(UserError, match=r"does not build for 9\.0") as caught:
        build_engine(request, NoProgress())
    assert "8.0 8.6 8.9 12.0" in caught.value.hint
    assert files_of(request) == set()


def test_all_bad_options_are_named_at_once(make_request: MakeRequest) -> None:
    """One edit mends them all, and no builder is started for them."""
    request = make_request(compute_capabilities=("90", "sm_89"), optimization_level=6, memory_pools={"cache": 1})
    with pytest.raises(UserErrors) as caught:
        build_engine(request, NoProgress())
    assert [problem.path for problem in caught.value.problems] == [
        "--compute-capability",
        "--compute-capability",
        "--builderOptimizationLevel",
        "--memPoolSize",
    ]


def test_onnx_target_has_no_engine(make_request: MakeRequest) -> None:
    """Asking for an engine of the ONNX target is a mistake, not an empty file."""
    with pytest.raises(UserErrors, match="onnx has no engine"):
        build_engine(make_request(target=Target.ONNX), NoProgress())


def test_engine_path_below_a_file_is_refused_before_the_build(make_request: MakeRequest, tmp_path: Path) -> None:
    """An unwritable place is found in milliseconds, not after the build."""
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file" / "out.plan", tmp_path / "file" / "deeper" / "out.plan"):
        request = make_request(engine_path=place)
        with pytest.raises(UserError, match="file"):
            build_engine(request, NoProgress())
        assert not request.log_path.exists()


def test_engine_path_that_is_a_directory_is_refused(make_request: MakeRequest, tmp_path: Path) -> None:
    """A directory under the engine's name is not replaced."""
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out"):
        build_engine(make_request(engine_path=tmp_path / "out"), NoProgress())
    assert (tmp_path / "out").is_dir()


def test_killed_worker_leaves_no_engine(
    make_request: MakeRequest, make_recipe: type[Recipe], recorder: Recorder
) -> None:
    """SIGKILL, as the kernel sends when memory runs out, becomes one clear error and leaves nothing behind."""

    def kill() -> None:
        for child in children():
            child.kill()

    recorder.on_update = kill
    request = make_request(make_recipe({f"layer.{number}": True for number in range(40)}))
    with pytest.raises(UserError, match="ended by SIGKILL") as caught:
        build_engine(request, recorder)
    assert "out of memory" in caught.value.hint
    assert files_of(request) == set()
    assert request.log_path.is_file()


def test_worker_that_cannot_start_is_our_bug(make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that fails without a result is reported with its last words, as a bug and not as a user's mistake."""
    monkeypatch.setattr("fptq_export.build.engine._WORKER", "fptq_export.build.no_such_worker")
    request = make_request()
    with pytest.raises(FptqError, match="no_such_worker") as caught:
        build_engine(request, NoProgress())
    assert caught.value.exit_code == ExitCode.BUG
    assert files_of(request) == set()


def test_interrupt_ends_the_worker(make_request: MakeRequest, recorder: Recorder) -> None:
    """Ctrl-C while building: no process and no half-written engine stay behind."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    recorder.on_update = interrupt
    request = make_request()
    with pytest.raises(KeyboardInterrupt):
        build_engine(request, recorder)
    assert children() == []
    assert files_of(request) == set()


BUILD_FROM_ARGUMENT = """
import json, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore it
from fptq_export.build.engine import BuildRequest, build_engine
from fptq_export.build.profiles import Profile, ShapeRange
from fptq_export.build.targets import Target
from fptq_export.progress import NoProgress
given = json.loads(sys.argv[1])
paths = {name: Path(given[name]) for name in ("onnx_path", "weights_dir", "engine_path", "log_path")}
profile = Profile((ShapeRange("x", (1, 1, 256), (1, 4, 256), (1, 8, 256)),))
build_engine(
    BuildRequest(**paths, target=Target.TENSORRT_RTX, quantized=given["quantized"], profiles=(profile,)), NoProgress()
)
"""


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_worker_does_not_outlive_the_command(make_request: MakeRequest, number: signal.Signals) -> None:
    """However the command ends, its worker ends too, and nothing has the final name."""
    request = make_request()
    names = ("onnx_path", "weights_dir", "engine_path", "log_path")
    given = {name: str(getattr(request, name)) for name in names} | {"quantized": request.quantized}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", BUILD_FROM_ARGUMENT, json.dumps(given)]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL) as process:
        parent = psutil.Process(process.pid)
        assert wait_until(lambda: bool(parent.children()) or process.poll() is not None)
        (worker,) = parent.children()
        process.send_signal(number)
        process.wait(timeout=30)
    assert wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    assert not request.engine_path.exists()

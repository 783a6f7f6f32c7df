"""`build_engine` with the plugin: the worker loads it, its layers are proven, its death is an error."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fptq_export.build import engine
from fptq_export.build.engine import BuildRequest, build_engine
from fptq_export.build.loader_path import loader_environment
from fptq_export.build.profiles import Profile, ShapeRange
from fptq_export.build.targets import Target
from fptq_export.errors import PrecisionError, UserError, UserErrors
from fptq_export.progress import NoProgress
from tests.plugins.lifecycle.test_loading import IN, LOADED, NAMES, OUT, run, write_graph
from tests.support.plugin import built_double

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the plugin is built on Linux only")

OPERATORS = {"layer0": "FptqW4A8GemmStatic", "layer1": "FptqW4A8GemmPerToken"}
CODES = dict.fromkeys(OPERATORS, 208 * 192)
TABLE_BYTES = 1024
"""Of entries that say where a library lies in a plan: TensorRT for RTX 1.7.1 takes 24 for one."""


@pytest.fixture
def request_for(tmp_path: Path) -> BuildRequest:
    """An engine of two linears in the plugin."""
    profile = Profile((ShapeRange("x", (1, 1, IN), (1, 16, IN), (4, 64, IN)),))
    return BuildRequest(
        onnx_path=write_graph(tmp_path / "graph.onnx"),
        weights_dir=tmp_path,
        engine_path=tmp_path / "out" / "out.plan",
        log_path=tmp_path / "build.log",
        target=Target.TENSORRT_RTX,
        quantized=CODES,
        profiles=(profile,),
        compute_capabilities=("8.0", "8.9"),
        plugin=OPERATORS,
        plugin_library=built_double() / LOADED,
    )


def test_engine_has_a_plugin_layer_for_each_linear(request_for: BuildRequest) -> None:
    """Static and per-token linears are plugin layers with their INT4 constants, in every profile."""
    second = Profile((ShapeRange("x", *(((1, 1, IN),) * 3)),))
    for profiles in (request_for.profiles, (*request_for.profiles, second)):
        report = build_engine(dataclasses.replace(request_for, profiles=profiles), NoProgress())
        assert (report.precision.plugin_layers, report.precision.plugin_linears) == (2, 2)
        assert report.precision.int4_constants == 2 * len(profiles)
        assert report.precision.layers_by_type["custom_layer"] == 2 * len(profiles)
        assert request_for.engine_path.stat().st_size > OUT * IN


def test_engine_that_carries_the_library_loads_without_it(request_for: BuildRequest) -> None:
    """It grows by the library and its place in a table, and brings both creators to the runtime that opens it.

    TensorRT for RTX loads the library before it looks for a GPU; the registry of the process stays empty.
    """
    plain = build_engine(request_for, NoProgress()).engine_bytes
    carrying = build_engine(dataclasses.replace(request_for, embed_plugin=True), NoProgress()).engine_bytes
    size = (built_double() / LOADED).stat().st_size
    assert 0 <= carrying - plain - size <= TABLE_BYTES
    opened = f"runtime.deserialize_cuda_engine(open('{request_for.engine_path}', 'rb').read())"
    found = run(f"""
runtime = trt.Runtime(logger)
runtime.engine_host_code_allowed = True
engine = {opened}
result["brought"] = found(runtime.get_plugin_registry())
result["shared"] = found(registry)
""")
    assert (found["brought"], found["shared"]) == (list(NAMES), [])


def test_engine_that_carries_no_library_is_not_built(request_for: BuildRequest) -> None:
    """What it should carry is not given: refused before TensorRT starts."""
    with pytest.raises(UserErrors, match="--embed-plugin"):
        build_engine(dataclasses.replace(request_for, plugin_library=None, embed_plugin=True), NoProgress())
    assert not request_for.log_path.exists()


def test_engine_that_is_not_what_was_asked_is_not_published(request_for: BuildRequest) -> None:
    """A linear that was to run natively and landed in the plugin fails the proof."""
    with pytest.raises(PrecisionError, match="natively expected"):
        build_engine(dataclasses.replace(request_for, plugin={"layer0": OPERATORS["layer0"]}), NoProgress())
    assert not request_for.engine_path.exists()


def test_graph_for_the_plugin_without_the_plugin_is_refused(request_for: BuildRequest) -> None:
    """Without the library TensorRT does not know the nodes: an error that names one of them, and no engine."""
    with pytest.raises(UserError, match="FptqW4A8Gemm"):
        build_engine(dataclasses.replace(request_for, plugin_library=None), NoProgress())
    assert not request_for.engine_path.exists()


@pytest.mark.parametrize("kind", ["text", "no plugins", "missing"])
def test_library_without_plugins_is_refused(request_for: BuildRequest, tmp_path: Path, kind: str) -> None:
    """A file that TensorRT cannot load is an error that names the command that builds the library."""
    library = tmp_path / "libother.so"
    if kind == "text":
        library.write_text("not a library", encoding="utf-8")
    elif kind == "no plugins":
        library.write_bytes((built_double(targets=("fptq_packing",)) / "libfptq_packing.so").read_bytes())
    with pytest.raises(UserError, match="cannot load this plugin library") as caught:
        build_engine(dataclasses.replace(request_for, plugin_library=library), NoProgress())
    assert "python -m fptq_export.plugin build" in str(caught.value)


def test_death_of_the_worker_is_an_error(request_for: BuildRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT for RTX ends its process where it does not find itself by name: the command reports it and lives on."""

    @contextmanager
    def without_link(_: Target) -> Iterator[dict[str, str]]:
        yield {}

    monkeypatch.setattr(engine, "loader_environment", without_link)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match="was ended by SIGABRT") as caught:
        build_engine(request_for, NoProgress())
    assert str(request_for.log_path) in str(caught.value)
    assert not request_for.engine_path.exists()


def test_loader_finds_rtx_only_while_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The link lives as long as the build, in front of the user's own path; other targets get nothing."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "/own/path")
    with loader_environment(Target.TENSORRT_RTX) as variables:
        directory, own = variables["LD_LIBRARY_PATH"].split(":")
        assert own == "/own/path"
        assert (Path(directory) / "libtensorrt_rtx.so").resolve().name.startswith("libtensorrt_rtx.so.")
    assert not Path(directory).exists()
    with loader_environment(Target.TENSORRT) as variables:
        assert variables == {}

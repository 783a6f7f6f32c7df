"""Both libraries in the registry of a real TensorRT for RTX, in processes of their own; engines built without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fptq_export.build.loader_path import loader_environment
from fptq_export.build.targets import Target
from fptq_export.errors import UserError
from fptq_export.packing import packed_scales_from_groups, packed_tiles_from_int4, padded_shape
from fptq_export.plugin.library import DIRECTORY_VARIABLE, library_for_loading, library_that_registers, plugin_info
from tests.support.plugin import ROOT, built_double

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the plugin is built on Linux only, and so is what is loaded here"
)

OUT, IN, GROUP = 200, 192, 64
LOADED, REGISTERING = "libfptq_trt.so", "libfptq_trt_static.so"
NAMES = ("FptqW4A8GemmStatic", "FptqW4A8GemmPerToken")

SCRIPT = """
import ctypes, json, sys
import tensorrt_rtx as trt

class Silent(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.lines = []

    def log(self, severity, text):
        self.lines.append(text)

def found(registry):
    return [name for name in {names} if registry.get_creator(name, "2", "fptq") is not None]

def build(path):
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(path):
        return 0
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 1, {k}), (1, 16, {k}), (4, 64, {k}))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    return 0 if engine is None else engine.nbytes

logger = Silent()
builder = trt.Builder(logger)
registry = trt.get_plugin_registry()
result = {{}}
{body}
result["layers"] = sum(text.count("LayerType: custom_layer") for text in logger.lines)
print(json.dumps(result))
"""


def run(body: str, preload: Path | None = None) -> dict[str, Any]:
    """Run lines in a process with TensorRT for RTX; what they put into `result`.

    Args:
        body: The lines.
        preload: A library for LD_PRELOAD; TensorRT is then also on the loader's path, as in an install from packages.
    """
    script = SCRIPT.format(names=NAMES, k=IN, body=body)
    with loader_environment(Target.TENSORRT_RTX) as loader:
        environment: dict[str, str] = {**os.environ, **loader}
        if preload is not None:
            (rtx,) = Path(loader["LD_LIBRARY_PATH"].split(":")[0]).iterdir()
            environment["LD_PRELOAD"] = str(preload)
            environment["LD_LIBRARY_PATH"] += f":{rtx.resolve().parent}"
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120, env=environment
        )
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**result, "stderr": done.stderr}


@pytest.fixture(scope="module")
def libraries() -> Path:
    return built_double()


def write_graph(path: Path, *, version: str = "2", packed_rows: int | None = None) -> Path:
    """Two lowered linears, static and per token, whose outputs are added."""
    rng = np.random.default_rng(0)
    padded_n, padded_k = padded_shape(OUT, IN)
    nodes, constants = [], []

    def constant(name: str, array: NDArray[Any]) -> str:
        constants.append(numpy_helper.from_array(array, name))
        return name

    for index, name in enumerate(NAMES):
        tiles = packed_tiles_from_int4(rng.integers(-8, 8, (OUT, IN)).astype(np.int8)).tobytes()
        shape = [packed_rows or padded_n, padded_k]
        constants.append(
            helper.make_tensor(f"tiles{index}", TensorProto.INT4, shape, tiles[: np.prod(shape) // 2], raw=True)
        )
        scales = packed_scales_from_groups(rng.random((OUT, IN // GROUP)).astype(np.float16))
        inputs = ["x", f"tiles{index}", constant(f"scales{index}", scales)]
        if index == 0:
            inputs.append(constant("x_scale", np.array(0.05, np.float32)))
        attributes = {"layout_version": 1, "scheme": 1, "group_size": GROUP, "in_features": IN, "out_features": OUT}
        node = helper.make_node(name, inputs, [f"y{index}"], f"layer{index}/{name}", domain="fptq.tensorrt")
        texts = {"plugin_namespace": "fptq", "plugin_version": version}
        node.attribute.extend(helper.make_attribute(key, value) for key, value in {**attributes, **texts}.items())
        nodes.append(node)
    nodes.append(helper.make_node("Add", ["y0", "y1"], ["y"], "add"))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", "tokens", size])
        for name, size in (("x", IN), ("y", OUT))
    ]
    graph = helper.make_graph(nodes, "test", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("fptq.tensorrt", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


def test_load_library_brings_both_creators(libraries: Path) -> None:
    """The registry of TensorRT finds the plugins by name, version and namespace after loadLibrary, not before."""
    body = f"result['before'] = found(registry); registry.load_library('{libraries / LOADED}')"
    result = run(f"{body}; result['after'] = found(registry)")
    assert result["before"] == []
    assert result["after"] == list(NAMES)


def test_opening_the_other_library_registers_both_creators(libraries: Path) -> None:
    """Dlopen alone, as Polygraphy and Triton do, makes the plugins known under their namespace."""
    body = f"library = ctypes.CDLL('{libraries / REGISTERING}'); result['flag'] = library.fptqIsRegistered()"
    result = run(f"{body}; result['after'] = found(registry)")
    assert result["flag"] == 1
    assert result["after"] == list(NAMES)
    assert "[fptq]" not in result["stderr"]


def test_preloading_registers_both_creators(libraries: Path) -> None:
    """LD_PRELOAD, before anything of TensorRT is loaded, finds it on the loader's path and registers there."""
    assert run("result['after'] = found(registry)", preload=libraries / REGISTERING)["after"] == list(NAMES)


def test_opening_the_loaded_library_registers_nothing(libraries: Path) -> None:
    """The library for loadLibrary does nothing by itself: a library that did both could not be loaded."""
    assert run(f"ctypes.CDLL('{libraries / LOADED}'); result['after'] = found(registry)")["after"] == []


def test_second_registration_is_refused_and_said(libraries: Path) -> None:
    """Both libraries in one process: the second one reports it and the process lives on."""
    body = f"registry.load_library('{libraries / LOADED}'); library = ctypes.CDLL('{libraries / REGISTERING}')"
    result = run(f"{body}; result['flag'] = library.fptqIsRegistered(); result['after'] = found(registry)")
    assert result["flag"] == 0
    assert "[fptq] the registry refused a plugin" in result["stderr"]
    assert result["after"] == list(NAMES)


def test_loading_where_there_is_no_tensorrt_only_reports(libraries: Path) -> None:
    """A process without TensorRT survives the library and learns what is missing."""
    code = f"import ctypes; print(ctypes.CDLL('{libraries / REGISTERING}').fptqIsRegistered())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "0\n", done.stderr
    assert "[fptq] no TensorRT is loaded or found" in done.stderr


@pytest.mark.parametrize("library", [LOADED, REGISTERING])
def test_library_needs_no_tensorrt_to_be_linked(libraries: Path, library: str) -> None:
    """One file serves every TensorRT: no symbol of TensorRT is left open, and none but ours is offered."""
    undefined = subprocess.run(["nm", "-D", "-u", str(libraries / library)], capture_output=True, text=True, check=True)
    assert [line for line in undefined.stdout.splitlines() if "nvinfer" in line.lower() or "Plugin" in line] == []
    defined = subprocess.run(
        ["nm", "-D", "--defined-only", str(libraries / library)], capture_output=True, text=True, check=True
    )
    offered = {line.split()[-1] for line in defined.stdout.splitlines()}
    own = {"getCreators", "setLoggerFinder"} if library == LOADED else {"fptqIsRegistered"}
    assert offered == {"fptqPluginInfo", *own}


@pytest.mark.parametrize("route", ["load", "open"])
def test_engine_is_built_with_the_plugin(libraries: Path, tmp_path: Path, route: str) -> None:
    """Both routes give an engine whose two linears are plugin layers, on a machine without a GPU."""
    graph = write_graph(tmp_path / "graph.onnx")
    load = {
        "load": f"registry.load_library('{libraries / LOADED}')",
        "open": f"library = ctypes.CDLL('{libraries / REGISTERING}')",
    }
    result = run(f"{load[route]}; result['bytes'] = build('{graph}')")
    assert result["layers"] == 2
    assert result["bytes"] > OUT * IN // 2 * 2


def test_weights_in_onnx_order_never_meet_the_kernels(libraries: Path, tmp_path: Path) -> None:
    """A node of version 1, the portable form, is not taken for a plugin, so its weights are not misread."""
    graph = write_graph(tmp_path / "graph.onnx", version="1")
    result = run(f"registry.load_library('{libraries / LOADED}'); result['bytes'] = build('{graph}')")
    assert result["bytes"] == 0


def test_weight_of_another_shape_builds_no_engine(libraries: Path, tmp_path: Path) -> None:
    """Packed weights that do not fit the node are found at build time, by name."""
    graph = write_graph(tmp_path / "graph.onnx", packed_rows=192)
    result = run(f"registry.load_library('{libraries / LOADED}'); result['bytes'] = build('{graph}')")
    assert result["bytes"] == 0
    assert "[fptq] FptqW4A8Gemm" in result["stderr"]
    assert "input 1 has a shape that does not fit 192 x 200 channels" in result["stderr"]


def test_info_says_what_the_library_was_built_from(libraries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version, layout, compute capabilities and headers are readable from Python, of the library that would be used."""
    import fptq_export

    monkeypatch.setenv(DIRECTORY_VARIABLE, str(libraries))
    info = fptq_export.plugin_info()
    assert info.library == library_for_loading() == libraries / LOADED
    assert library_that_registers() == libraries / REGISTERING
    assert (info.version, info.layout_version, info.kernels, info.architectures) == ("0.0.test", 1, "double", ())
    assert int(info.tensorrt_headers.split(".")[0]) >= 10
    assert plugin_info(libraries / REGISTERING).version == info.version


def test_missing_library_names_the_command_that_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is built the person is told how to build it; no other place is taken instead."""
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=r"python -m fptq_export\.plugin build"):
        library_for_loading()


def test_other_library_is_not_ours() -> None:
    """A shared library without our entry point is refused with a sentence."""
    library = built_double(targets=("fptq_packing",)) / "libfptq_packing.so"
    with pytest.raises(UserError, match="is not a plugin library of fptq-export"):
        plugin_info(library)


def test_command_prints_what_is_in_the_library(libraries: Path) -> None:
    """`python -m fptq_export.plugin info` prints JSON; without a library it ends with 1 and a sentence."""
    command = [sys.executable, "-m", "fptq_export.plugin", "info"]
    for directory, code in ((libraries, 0), (ROOT / "tests", 1)):
        environment = {**os.environ, DIRECTORY_VARIABLE: str(directory)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
        assert done.returncode == code
        assert ('"layout_version": 1' in done.stdout) == (code == 0)
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [("--arch", "75"), ("--tensorrt-include", "nowhere")])
def test_build_that_cannot_work_is_refused_at_once(tmp_path: Path, words: tuple[str, ...]) -> None:
    """An unknown architecture or a directory without headers ends with 1, a sentence and no build."""
    command = [sys.executable, "-m", "fptq_export.plugin", "build", "--directory", str(tmp_path / "build"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert words[1] in done.stderr
    assert not (tmp_path / "build").exists()

"""The SmolLM2 engine with the plugin: which layers it has, and where its bytes go.

What TensorRT for RTX 1.7.1.116 puts into the plan, measured on this engine (155 kernels, 139.0 MB):

* Every constant once, byte for byte as the graph has it: 112.7 MB. The tied embedding and head share one copy.
* CUDA source text of the kernels that it compiles on the user's GPU: 23.2 MB. A text has 134 to 176 kB, 86 % of it
  lines that all texts share, and is stored again for most layers: without comments 11 of the 155 differ. The plan has
  as many bytes with one compute capability as with four, with verbosity NONE as with DETAILED, and at every
  optimization level; REFIT and STRIP_PLAN need a GPU. Constant shapes for Reshape and Expand, one cache for all layers
  or no cache outputs leave all 155 texts.
* 3.1 MB of tables: tensors, layers, shape arithmetic. No machine code, and not the plugin library.

So the promise of 5 % is checked without the text of the kernels.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fptq_export.cli import main
from fptq_export.graph_io import load_graph
from fptq_export.plugin.library import DIRECTORY_VARIABLE
from tests.plugins.smollm2.real_linears import RealModel
from tests.support.plugin import built_double

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the plugin is built on Linux only"),
]

LAYERS, LINEARS_A_LAYER = 30, 7
FUSED_A_LAYER = 4
"""q, k, v; o; gate, up; down."""
LARGEST_ENGINE_TO_WEIGHTS = 1.05
"""The promise, for everything but kernel sources."""
SEARCHED_BYTES = 256
"""Smaller constants could be in the plan by chance."""
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e]{4096,}")
_KERNEL = b"__global__"
_ELF = b"\x7fELF"


@dataclass(frozen=True)
class Engine:
    """A plan and what the manifest says about it."""

    plan: bytes
    summary: dict[str, Any]

    @property
    def kernel_text_bytes(self) -> int:
        """Source text of kernels."""
        return sum(len(text[0]) for text in _TEXT.finditer(self.plan) if _KERNEL in text[0])


def built(run: Path, scratch: Path, option: str) -> Engine:
    """The engine that the command line builds from a copy of a finished run."""
    copy, plan = scratch / "run", scratch / "plugin.plan"
    shutil.copytree(run, copy)  # ONNX refuses weights with two hard links
    try:
        assert main(["build", str(copy), "--engine", str(plan), "--plugin", "on", option]) == 0
    finally:
        logging.disable(logging.NOTSET)
    record = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))["stages"]["build"]
    shutil.rmtree(copy)
    return Engine(plan.read_bytes(), record["summary"])


@pytest.fixture(scope="module")
def plugin_library() -> Iterator[None]:
    """The plugin with a double of its kernels, where the command looks for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DIRECTORY_VARIABLE, str(built_double()))
        yield


@pytest.fixture(scope="module")
def engine(smollm2_run: Path, plugin_library: None, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The engine of the default options."""
    return built(smollm2_run, tmp_path_factory.mktemp("fused"), "--fuse-projections")


def test_every_linear_is_in_a_fused_plugin_layer(engine: Engine) -> None:
    """210 linears in 120 plugin layers, each with the only INT4 constant of its linears; none runs elsewhere."""
    summary = engine.summary
    assert summary["quantized_linears"] == summary["plugin_linears"] == LAYERS * LINEARS_A_LAYER
    assert summary["plugin_layers"] == summary["layers_by_type"]["custom_layer"] == LAYERS * FUSED_A_LAYER
    assert (summary["int4_constants"], summary["unfused"], summary["not_in_plugin"]) == (LAYERS * FUSED_A_LAYER, [], {})


def test_without_fusion_every_linear_is_a_plugin_layer(smollm2_run: Path, plugin_library: None, tmp_path: Path) -> None:
    """210 linears, 210 plugin layers."""
    summary = built(smollm2_run, tmp_path, "--no-fuse-projections").summary
    linears = LAYERS * LINEARS_A_LAYER
    assert (summary["plugin_layers"], summary["plugin_linears"], summary["int4_constants"]) == (linears,) * 3


def test_every_constant_is_in_the_plan_once(engine: Engine, real_model: RealModel) -> None:
    """Packed weights, scales and the FP16 rest: none doubled, none unpacked; head and embedding are one."""
    found = {
        name: engine.plan.count(value.const_value.tobytes())
        for name, value in load_graph(real_model.lowered).graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes >= SEARCHED_BYTES
    }
    assert len(found) > LAYERS * FUSED_A_LAYER * 2
    assert {name: count for name, count in found.items() if count != 1} == {}


def test_engine_is_within_five_percent_of_its_weights(engine: Engine, real_model: RealModel) -> None:
    """The plan without the source text of its kernels, against packed weights, scales and FP16 rest."""
    constants = load_graph(real_model.lowered).graph.initializers.values()
    weights = sum(value.const_value.nbytes for value in constants if value.const_value is not None)
    assert engine.kernel_text_bytes > 0, "no kernel source found: this plan has another form than the one measured"
    rest = len(engine.plan) - engine.kernel_text_bytes
    assert weights < rest <= LARGEST_ENGINE_TO_WEIGHTS * weights


def test_plugin_library_is_not_in_the_plan(engine: Engine) -> None:
    """The engine names the plugin and does not carry it: the library is loaded beside it."""
    assert b"FptqW4A8GemmStatic" in engine.plan
    assert _ELF not in engine.plan

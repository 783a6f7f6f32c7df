"""Runs the C++ life-cycle tests under sanitizers, and compares what C++ and Python say about the boundary."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from fptq_export import packing
from fptq_export.plugin.status import Status
from fptq_export.policy import GROUP_SIZES
from tests.support.plugin import ROOT, built_double

INCLUDE = ROOT / "plugins" / "include" / "fptq"
SOURCES = sorted((ROOT / "plugins" / "src").glob("*"))


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_life_of_a_plugin(sanitizers: str) -> None:
    """Creators, fields, shapes, tactics, clones in eight threads and every error code, without a finding."""
    program = built_double(sanitizers, targets=("lifecycle_test",)) / "lifecycle_test"
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "\n0 of " in done.stdout
    assert "Sanitizer" not in done.stderr


def test_a_failing_test_fails_the_run() -> None:
    """The harness is no decoration: a filter that runs nothing is a failure."""
    program = built_double("address,undefined", targets=("lifecycle_test",)) / "lifecycle_test"
    done = subprocess.run([str(program), "no such test"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1


def test_errors_name_the_layer_and_the_plugin() -> None:
    """What the plugin refuses it explains on standard error: the layer and the field."""
    program = built_double("address,undefined", targets=("lifecycle_test",)) / "lifecycle_test"
    done = subprocess.run([str(program), "WrongFields"], capture_output=True, text=True, check=False, timeout=60)
    assert "[fptq] layer: group_size 48 does not fit scheme 1\n" in done.stderr
    assert all(line.startswith("[fptq] layer: ") for line in done.stderr.splitlines())


def test_status_codes_are_those_of_the_header() -> None:
    """Python and C++ mean the same by a number."""
    found = re.findall(r"FPTQ_([A-Z_]+) = (\d+)", (INCLUDE / "status.h").read_text(encoding="utf-8"))
    assert {name: int(number) for name, number in found} == {status.name: status.value for status in Status}


def test_layout_constants_are_those_of_the_header() -> None:
    """Tile sizes, the layout's version and the group sizes are the same on both sides."""
    text = (INCLUDE / "layout.h").read_text(encoding="utf-8")
    numbers = {name: int(value) for name, value in re.findall(r"#define FPTQ_(\w+) (\d+)\n", text)}
    assert (numbers["TILE_N"], numbers["TILE_K"]) == (packing.TILE_OUT, packing.TILE_IN)
    assert numbers["MIN_N_MULTIPLE"] == packing.OUT_MULTIPLE
    assert numbers["LAYOUT_VERSION"] == packing.LAYOUT_VERSION
    assert numbers["TILE_BYTES"] == packing.TILE_OUT * packing.TILE_IN // 2
    (sizes,) = re.findall(r"#define FPTQ_GROUP_SIZES \{([\d, ]+)\}", text)
    assert tuple(int(size) for size in sizes.split(",")) == GROUP_SIZES


@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix in {".cpp", ".h", ".cu", ".cuh"}], ids=str)
def test_nothing_ends_the_host_process(path: Path) -> None:
    """No source of the plugin throws, aborts, exits or resets the device."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"\b(?:throw|abort\(|exit\(|terminate\(|cudaDeviceReset|(?<!static_)assert\()", code)
    assert found == []


def test_no_tensorrt_header_is_reachable_from_the_boundary() -> None:
    """The kernels and whoever calls them from elsewhere need no TensorRT."""
    for header in INCLUDE.glob("*.h"):
        assert "NvInfer" not in header.read_text(encoding="utf-8")

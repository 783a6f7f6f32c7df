"""A plugin library in an engine: what the builder is asked, what it must have done, and whose code may run."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fptq_export.build.embedded_plugin import check_embedded, embed_plugin
from fptq_export.build.open_engine import open_engine
from fptq_export.build.targets import Target
from fptq_export.errors import UserError

TRT: Any = SimpleNamespace(__name__="tensorrt", __version__="8.0")
DOUBLE = """
__version__ = "1.0"


class ILogger:
    pass


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, plan):
        self.logger.log(1, f"its code may run: {self.engine_host_code_allowed}")
"""
"""TensorRT for RTX, of which a refusal is seen only."""


def test_builder_without_the_setting_is_refused(tmp_path: Path) -> None:
    """An attribute that is set on an object that does not know it would embed nothing."""
    with pytest.raises(UserError, match=r"tensorrt 8\.0 does not put plugin libraries into engines"):
        embed_plugin(TRT, SimpleNamespace(), tmp_path / "libfptq_trt.so")


def test_engine_that_lacks_a_byte_of_the_library_is_refused(tmp_path: Path) -> None:
    """A builder that takes the setting and drops the library gives no engine that claims to carry it."""
    library, engine = tmp_path / "libfptq_trt.so", tmp_path / "out.plan"
    content = b"\x7fELF" + bytes(range(256)) * 16
    library.write_bytes(content)
    engine.write_bytes(b"header" + content + b"weights")
    check_embedded(TRT, engine, library)
    engine.write_bytes(b"header" + content[:-1] + b"weights")
    with pytest.raises(UserError, match=r"built an engine without libfptq_trt\.so in it"):
        check_embedded(TRT, engine, library)


@pytest.mark.parametrize("host_code", [True, False])
def test_code_of_an_engine_runs_only_where_it_was_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host_code: bool
) -> None:
    """The word reaches the process that opens the engine; without it TensorRT is told not to."""
    (tmp_path / "tensorrt_rtx.py").write_text(DOUBLE, encoding="utf-8")
    (tmp_path / "out.plan").touch()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    opened = open_engine(Target.TENSORRT_RTX, tmp_path / "out.plan", host_code=host_code)
    assert opened.errors == (f"its code may run: {host_code}",)

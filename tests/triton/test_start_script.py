"""`start.sh` starts the server with what the engines of its repository need."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fptq_export.errors import UserError
from fptq_export.files import sha256_from_file
from fptq_export.plugin.library import DIRECTORY_VARIABLE, LOADED_LIBRARY, REGISTERING_LIBRARY
from fptq_export.triton.options import TritonOptions
from fptq_export.triton.plugins import EMBEDDED_PLUGIN_FILE
from fptq_export.triton.run import run_triton
from fptq_export.triton.serving.routing import ROUTE_HEADER
from tests.triton.engine_runs import engine_run

ROUTES = f"--grpc-header-forward-pattern={ROUTE_HEADER}"
"""So that a router sees the metadata."""


def built_plugin(directory: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> dict[str, Any]:
    """Stand-ins for both libraries where they are looked for, and what a manifest says of an engine with them."""
    directory.mkdir()
    for name in (LOADED_LIBRARY, REGISTERING_LIBRARY):
        (directory / name).write_bytes(content)
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(directory))
    plugin = {"version": "0.1.0", "layout_version": 1, "architectures": [89], "tensorrt_headers": "10.16"}
    return {"plugin_layers": 14, "plugin": {**plugin, "sha256": sha256_from_file(directory / LOADED_LIBRARY)}}


def write(run: Path, repository: Path, **options: Any) -> None:
    """Write the models of a run."""
    run_triton(TritonOptions(source=run, repository=repository, **options), "fptq-export triton")


def arguments(repository: Path, tmp_path: Path) -> list[str]:
    """What `start.sh` gives to the tritonserver on PATH."""
    server = tmp_path / "bin" / "tritonserver"
    server.parent.mkdir(exist_ok=True)
    server.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    server.chmod(0o755)
    script = [str(repository / "start.sh"), "--http-port", "9000"]
    environment = {"PATH": f"{server.parent}:/usr/bin:/bin"}
    return subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_plugin_is_beside_the_plan_and_named_to_the_server(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its path does not depend on where the script is called from; a model without a plugin leaves it named."""
    facts = built_plugin(tmp_path / "plugin", monkeypatch, b"library")
    repository = tmp_path / "my models"
    write(engine_run(finished_run, tmp_path / "tiny", "concat", **facts), repository)
    write(finished_run / "run", repository, variant="cpu", name="other")
    library = repository / "tiny-plan" / "1" / REGISTERING_LIBRARY
    assert library.read_bytes() == b"library"
    backend = ["--model-repository", str(repository), f"--backend-config=tensorrt,plugins={library}"]
    assert arguments(repository, tmp_path) == [*backend, ROUTES, "--http-port", "9000"]


def test_engines_without_the_plugin_name_none(finished_run: Path, tmp_path: Path) -> None:
    """Options of the caller go behind."""
    write(engine_run(finished_run, tmp_path / "tiny", "concat"), tmp_path / "models")
    expected = ["--model-repository", str(tmp_path / "models"), ROUTES, "--http-port", "9000"]
    assert arguments(tmp_path / "models", tmp_path) == expected


def test_server_may_run_the_plugin_that_an_engine_carries(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No library is asked for or copied; models that come later leave the option, and the other kind adds its own."""
    facts = built_plugin(tmp_path / "plugin", monkeypatch, b"library")
    carrying = {**facts, "plugin": {**facts["plugin"], "embedded": True}}
    repository = tmp_path / "models"
    with pytest.MonkeyPatch.context() as without:
        without.setenv(DIRECTORY_VARIABLE, str(tmp_path / "nowhere"))
        write(engine_run(finished_run, tmp_path / "tiny", "concat", **carrying), repository)
    version = repository / "tiny-plan" / "1"
    assert {path.name for path in version.iterdir()} == {"model.plan", EMBEDDED_PLUGIN_FILE}
    assert json.loads((version / EMBEDDED_PLUGIN_FILE).read_text())["sha256"] == facts["plugin"]["sha256"]
    allowed = "--backend-config=tensorrt,version-compatible=true"
    front = ["--model-repository", str(repository)]
    assert arguments(repository, tmp_path) == [*front, allowed, ROUTES, "--http-port", "9000"]
    write(engine_run(finished_run, tmp_path / "other", "concat", **facts), repository)
    library = repository / "other-plan" / "1" / REGISTERING_LIBRARY
    both = [f"--backend-config=tensorrt,plugins={library}", allowed]
    assert arguments(repository, tmp_path) == [*front, *both, ROUTES, "--http-port", "9000"]


def test_plugin_of_another_build_is_refused(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the engine was not built with, and one beside an engine that needs another."""
    facts = built_plugin(tmp_path / "plugin", monkeypatch, b"library")
    run = engine_run(finished_run, tmp_path / "tiny", "concat", **facts)
    write(run, tmp_path / "models")
    other = built_plugin(tmp_path / "other", monkeypatch, b"other library")
    with pytest.raises(UserError, match="is not the library that the engine was built with"):
        write(run, tmp_path / "models")
    with pytest.raises(UserError, match="is another build of the plugin"):
        write(engine_run(finished_run, tmp_path / "second", "concat", **other), tmp_path / "models")
    assert not (tmp_path / "models" / "second").exists()


def test_plugin_that_is_not_built_is_refused(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written."""
    facts = built_plugin(tmp_path / "plugin", monkeypatch, b"library")
    for library in (tmp_path / "plugin").iterdir():
        library.unlink()
    with pytest.raises(UserError, match="libfptq_trt"):
        write(engine_run(finished_run, tmp_path / "tiny", "concat", **facts), tmp_path / "models")
    assert not (tmp_path / "models").exists()

"""What keeps a server from starting is said before the model is loaded, in one sentence."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fptq_export.cli import main
from fptq_export.errors import UserError
from fptq_export.serve import server
from fptq_export.serve.options import ServeOptions
from fptq_export.serve.run import keys_from_file, name_of_model, run_serve
from fptq_export.serve.server import socket_for_address, url_of_socket


@pytest.fixture
def ends_at_once(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Servers stop as soon as they take connections; the addresses they announced."""
    announced: list[str] = []
    startup = server.DrainingServer.startup

    async def start_and_stop(self: server.DrainingServer, sockets: Any = None) -> None:
        await startup(self, sockets)
        self.should_exit = True

    monkeypatch.setattr(server.DrainingServer, "startup", start_and_stop)
    return announced


def served_notes(options: ServeOptions, announced: list[str]) -> str:
    """What the server says on stderr."""
    console = Console(record=True, width=200)
    run_serve(options, console, announced.append, verbose=False)
    return console.export_text()


def test_address_and_backend_are_said(ends_at_once: list[str], chat_run: Path) -> None:
    """The address with the port that was free, the model's name, and what runs it."""
    options = ServeOptions(source=chat_run, port=0, backend="onnxruntime", threads=1, served_model_name="mine")
    notes = served_notes(options, ends_at_once)
    assert re.search(r"mine is model\.w4a8\.onnx \((stock operators|CPU kernels)\) in onnxruntime", notes)
    (url,) = ends_at_once
    assert url.startswith("http://127.0.0.1:")
    assert url.endswith("/v1")
    assert not url.endswith(":0/v1")


def test_what_static_layers_clip_is_counted(
    run_with_ranges: Path, ends_at_once: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with the output gets the metric without an option; it is on the page before the first request."""
    pages: list[bytes] = []
    startup = server.DrainingServer.startup

    async def kept_page(self: server.DrainingServer, sockets: Any = None) -> None:
        app: Any = self.config.app
        pages.append(app.state.service.metrics.page())
        await startup(self, sockets)

    monkeypatch.setattr(server.DrainingServer, "startup", kept_page)
    served_notes(ServeOptions(source=run_with_ranges, port=0, backend="onnxruntime", threads=1), ends_at_once)
    (page,) = pages
    assert b'layers="model.layers.0.self_attn.q_proj, k_proj, v_proj"' in page


@pytest.mark.parametrize("keys", [False, True])
def test_open_address_without_keys_is_pointed_out(
    ends_at_once: list[str], chat_run: Path, tmp_path: Path, keys: bool
) -> None:
    """A model that anyone on the network may use is a choice, not an accident."""
    file = tmp_path / "keys.txt"
    file.write_text("one\n")
    options = ServeOptions(
        source=chat_run, host="0.0.0.0", port=0, backend="onnxruntime", threads=1, api_key_file=file if keys else None
    )
    assert ("--api-key-file asks for a key" in served_notes(options, ends_at_once)) is not keys


def test_run_without_a_tokenizer_is_refused(chat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Clients send text."""
    run = shutil.copytree(chat_run, tmp_path / "run")
    (run / "tokenizer.json").unlink()
    assert main(["serve", str(run), "--port", "0", "--backend", "onnxruntime"]) == 1
    assert "there is no tokenizer.json beside the model" in capsys.readouterr().err


def test_port_in_use_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Before the model is looked for."""
    with socket_for_address("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", str(tmp_path), "--port", port]) == 1
    assert f"127.0.0.1:{port}: cannot be bound (Address already in use)" in capsys.readouterr().err


def test_name_of_another_machine_is_refused() -> None:
    """The reserved address of documentation is nobody's."""
    with pytest.raises(UserError, match="cannot be bound"):
        socket_for_address("192.0.2.1", 8000)


def test_url_of_an_ipv6_address_has_brackets() -> None:
    """Without them the port would be part of the address."""
    try:
        bound = socket_for_address("::1", 0)
    except UserError as error:
        pytest.skip(f"there is no IPv6 here: {error}")
    with bound:
        assert url_of_socket(bound) == f"http://[::1]:{bound.getsockname()[1]}"


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "jinja2", "prometheus_client"])
def test_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    """With the command that installs it."""
    find: Callable[[str], object] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert main(["serve", "run"]) == 1
    error = capsys.readouterr().err
    assert f"{missing}: is not installed" in error
    assert "pip install 'fptq-export[serve]'" in error


def test_options_are_checked_together(capsys: pytest.CaptureFixture[str]) -> None:
    """Every wrong one is named, and a missing directory says what to give."""
    assert main(["serve", "run", "--port", "70000", "--backend", "torch", "--max-active", "0"]) == 1
    error = capsys.readouterr().err
    assert all(option in error for option in ("--port", "--backend", "--max-active"))
    assert main(["serve"]) == 1
    assert "fptq-export serve RUN" in capsys.readouterr().err


def test_keys_are_lines(tmp_path: Path) -> None:
    """White space around them and empty lines are not part of a key."""
    file = tmp_path / "keys"
    file.write_text("one\n\n  two \r\n")
    assert keys_from_file(file) == ("one", "two")


@pytest.mark.parametrize(("content", "cause"), [(None, "cannot be read"), (b"\n \n", "no key"), (b"\xff", "cannot be")])
def test_file_without_keys_is_refused(tmp_path: Path, content: bytes | None, cause: str) -> None:
    """A server that was to be locked must not be open."""
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=cause):
        keys_from_file(file)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M"),
        ("models/SmolLM2.Q4_1.gguf", "SmolLM2.Q4_1"),
        ("models/llama-3.1/", "llama-3.1"),
    ],
)
def test_model_is_called_what_people_call_it(chat_run: Path, tmp_path: Path, model: str, name: str) -> None:
    """The last part of a hub id or path, without the ending of a file."""
    manifest = json.loads((chat_run / "manifest.json").read_text())
    manifest["options"]["model"] = model
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert name_of_model(tmp_path) == name
    assert name_of_model(tmp_path / "model.w4a8.onnx") == name


def test_graph_without_a_run_has_the_name_of_its_file(tmp_path: Path) -> None:
    """There is nothing else to call it by."""
    assert name_of_model(tmp_path / "tiny.onnx") == "tiny"

"""Models and versions appear whole or not at all, and the server follows them without a break."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fptq_export.cli import main
from fptq_export.errors import UserError
from fptq_export.triton import repository as repository_module
from fptq_export.triton.options import TritonOptions
from fptq_export.triton.run import run_triton
from fptq_export.triton.wheel_server import wheel_server
from tests.support.triton_server import TritonServer


def write(run: Path, repository: Path, **options: Any) -> None:
    """Write a CPU model."""
    run_triton(TritonOptions(source=run, repository=repository, variant="cpu", threads=1, **options), "fptq-export")


def files_of(repository: Path) -> dict[str, bytes]:
    """Every file and what it holds."""
    return {str(path.relative_to(repository)): path.read_bytes() for path in repository.rglob("*") if path.is_file()}


def test_versions_count_up(finished_run: Path, tmp_path: Path) -> None:
    """The next free one, or the one that is asked for; never one that is there."""
    for options in ({}, {}, {"version": 7}, {}):
        write(finished_run / "run", tmp_path / "models", name="tiny", **options)
    assert repository_module.versions_of(tmp_path / "models" / "tiny") == [1, 2, 7, 8]
    with pytest.raises(UserError, match="this version is there already"):
        write(finished_run / "run", tmp_path / "models", name="tiny", version=7)


def test_name_is_that_of_the_run_directory(finished_run: Path, tmp_path: Path) -> None:
    """And one that can be part of an address."""
    write(finished_run / "run", tmp_path / "models")
    assert (tmp_path / "models" / "run" / "config.pbtxt").is_file()
    odd = shutil.copytree(finished_run / "run", tmp_path / "odd run")
    with pytest.raises(UserError, match="cannot be part of an address"):
        write(odd, tmp_path / "models")


def test_command_that_breaks_leaves_what_was_there(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a byte of the repository changes, and nothing stays beside it; the next command works."""
    repository = tmp_path / "models"
    write(finished_run / "run", repository, name="tiny")
    before = files_of(repository)

    def full(source: Path, target: Path) -> None:
        if source.name.endswith(".data"):
            raise OSError(28, "No space left on device", str(target))
        shutil.copyfile(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(repository_module, "_copy", full)
        with pytest.raises(OSError, match="No space left"):
            write(finished_run / "run", repository, name="tiny")
    assert files_of(repository) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"models", ".models.lock"}
    write(finished_run / "run", repository, name="tiny")
    assert repository_module.versions_of(repository / "tiny") == [1, 2]


def test_model_of_another_kind_is_not_overwritten(finished_run: Path, tmp_path: Path) -> None:
    """A directory of that name that is another backend's, or no model at all."""
    model = tmp_path / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"has no config\.pbtxt"):
        write(finished_run / "run", tmp_path / "models", name="tiny")
    (model / "config.pbtxt").write_text('backend: "onnxruntime"', encoding="utf-8")
    with pytest.raises(UserError, match="is a model of backend 'onnxruntime'"):
        write(finished_run / "run", tmp_path / "models", name="tiny")
    assert (model / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_command_line_says_what_was_written(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table, and the same as JSON."""
    words = ["--repository", str(tmp_path / "models"), "--variant", "cpu", "--name", "tiny"]
    assert main(["triton", str(finished_run / "run"), *words]) == 0
    assert "tiny" in capsys.readouterr().out
    report = json.loads((tmp_path / "models" / "triton.json").read_text(encoding="utf-8"))
    assert [(model["name"], model["version"]) for model in report["models"]] == [("tiny", 1)]
    assert "model.w4a8.onnx" in report["models"][0]["files"]


def test_new_version_takes_over_without_a_break(server: TritonServer, repository: Path, finished_run: Path) -> None:
    """While clients ask on, version 2 is loaded and version 1 goes; no request fails."""
    write(finished_run / "run", repository, name="update")
    assert server.load("update").status == 200
    versions: list[str] = []
    problems: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            reply = server.post("/v2/models/update/generate", {"text_input": "x", "max_tokens": 4})
            if reply.status == 200:
                versions.append(reply.document["model_version"])
            else:
                problems.append(reply.text)
            time.sleep(0.01)

    client = threading.Thread(target=ask)
    client.start()
    write(finished_run / "run", repository, name="update")
    assert server.load("update").status == 200
    stop.set()
    client.join()
    assert problems == []
    assert versions[0] == "1"
    reply = server.post("/v2/models/update/generate", {"text_input": "x", "max_tokens": 1})
    assert reply.document["model_version"] == "2"
    server.unload("update")


@pytest.mark.parametrize(
    ("what", "file"),
    [("weights", "model.w4a8.onnx.data"), ("tokenizer", "tokenizer.json")],
)
def test_model_without_a_file_is_refused(
    server: TritonServer, repository: Path, finished_run: Path, what: str, file: str
) -> None:
    """The one who loads it is told which file; the server lives."""
    model = f"without-{what}"
    write(finished_run / "run", repository, name=model)
    (repository / model / "1" / file).unlink()
    reply = server.load(model)
    assert reply.status == 400
    assert file in reply.document["error"]
    assert server.is_live()


def test_truncated_graph_is_refused(server: TritonServer, repository: Path, finished_run: Path) -> None:
    """A copy that was cut off; the error names the file."""
    write(finished_run / "run", repository, name="truncated")
    graph = repository / "truncated" / "1" / "model.w4a8.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[: len(content) // 2])
    reply = server.load("truncated")
    assert reply.status == 400
    assert "model.w4a8.onnx" in reply.document["error"]


def test_killed_server_starts_again(repository: Path, triton_wheel: None, tmp_path: Path) -> None:
    """Killed in the middle of a stream: the client gets an error, and the same repository serves again."""
    layout = wheel_server(tmp_path)
    options = ("--model-repository", str(repository), "--model-control-mode=explicit", "--load-model=tiny")
    server = TritonServer((*layout.command, *options), layout.environment, tmp_path / "log")
    server.start()
    body = {"text_input": "An assignment", "max_tokens": 1500, "ignore_eos": True}
    killer = threading.Timer(0.3, server.kill)
    killer.start()
    with pytest.raises(OSError, match=r"closed|reset|refused"):
        server.post("/v2/models/tiny/generate", body)
    killer.join()
    server.start()
    assert server.post("/v2/models/tiny/generate", {"text_input": "x", "max_tokens": 1}).status == 200
    assert server.stop() == 0

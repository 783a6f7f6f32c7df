"""The tiny LLaMA with a chat template, and a server of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fptq_export.runtime import Session
from tests.serve.serving import Served, serving

TEMPLATE = """\
{%- if messages[0].role == 'assistant' %}{{ raise_exception('the first message must not be an answer') }}{% endif %}
{%- for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.fixture(scope="session")
def chat_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run of the tiny LLaMA whose model was trained for chats, so to say."""
    run = Path(shutil.copytree(finished_run / "run", tmp_path_factory.mktemp("chat") / "run"))
    (run / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return run


@pytest.fixture(scope="session")
def session(chat_run: Path) -> Iterator[Session]:
    """The run in ONNX Runtime, on one thread."""
    with Session.open(chat_run, backend="onnxruntime", kernels="stock", threads=1) as opened:
        yield opened


@pytest.fixture(scope="session")
def served(session: Session) -> Iterator[Served]:
    """A server of it."""
    with serving(session) as server:
        yield server

"""`fptq-export serve`: open the model, serve it until a signal comes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from rich.console import Console

from fptq_export.errors import UserError
from fptq_export.package.manifest import read_manifest
from fptq_export.runtime import Scheduler, Session
from fptq_export.serve.options import ServeOptions

__all__ = ["check_libraries", "keys_from_file", "name_of_model", "run_serve"]

_LIBRARIES = ("fastapi", "uvicorn", "jinja2", "prometheus_client")
_LOOPBACK = ("127.", "::1", "localhost")


def run_serve(options: ServeOptions, notes: Console, announce: Callable[[str], None], *, verbose: bool) -> None:
    """Serve a model; returns when it was told to stop and the texts are finished.

    Args:
        options: Model, address, limits.
        notes: Where notes go.
        announce: Takes the address once connections are taken.
        verbose: Log every request.

    Raises:
        UserError: A library, a file or the address is not there, or the model cannot be opened.
    """
    check_libraries()
    from fptq_export.runtime.metrics import Metrics
    from fptq_export.serve.app import app_for_service
    from fptq_export.serve.server import DrainingServer, socket_for_address, url_of_socket
    from fptq_export.serve.service import Service

    def note(text: str) -> None:
        notes.print(text, markup=False, soft_wrap=True)

    keys = () if options.api_key_file is None else keys_from_file(options.api_key_file)
    if not keys and not options.host.startswith(_LOOPBACK):
        note(f"{options.host}: whoever reaches this address may use the model; --api-key-file asks for a key")
    name = options.served_model_name or name_of_model(options.source)
    with (
        closing(socket_for_address(options.host, options.port)) as bound,
        Session.open(
            options.source, engine=options.engine, backend=options.backend, threads=options.threads
        ) as session,
    ):
        if session.tokenizer is None:
            hint = "copy the model's tokenizer files into that directory"
            raise UserError(str(options.source), "there is no tokenizer.json beside the model", hint)
        note(f"{name} is {session.model.name} in {session.backend}" + (f": {session.note}" if session.note else ""))
        metrics = Metrics(name, ranges=session.ranges)
        scheduler = Scheduler(session, max_active=options.max_active, max_queue=options.max_queue, observer=metrics)
        service = Service(session, session.tokenizer, scheduler, metrics, name, options.max_queue, keys)
        server = DrainingServer(
            app_for_service(service),
            scheduler,
            drain_timeout=options.drain_timeout,
            verbose=verbose,
            notify=note,
            started=lambda: announce(f"{url_of_socket(bound)}/v1"),
        )
        try:
            server.run([bound])
        finally:
            scheduler.close(drain=False)


def check_libraries() -> None:
    """Find what only servers need, before a model is loaded.

    Raises:
        UserError: One is not installed.
    """
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(", ".join(missing), "is not installed", "pip install 'fptq-export[serve]'")


def keys_from_file(path: Path) -> tuple[str, ...]:
    """The API keys of a file, one a line.

    Raises:
        UserError: There is no such file, or no key in it.
    """
    try:
        keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read ({error})", "give a text file with one API key a line") from error
    if not keys:
        raise UserError(str(path), "there is no key in it", "write one API key a line")
    return keys


def name_of_model(source: Path) -> str:
    """What people call a model: the last part of its hub id or path.

    Args:
        source: Run directory, engine or graph.
    """
    directory = source if source.is_dir() else source.parent
    manifest = read_manifest(directory) if directory.is_dir() else None
    model = Path(source.resolve().name if manifest is None else manifest.options.model)
    return model.stem if model.suffix in (".gguf", ".onnx", ".plan") else model.name

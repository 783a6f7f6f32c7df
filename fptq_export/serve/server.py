"""The server process: its socket, and how it stops."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType

import uvicorn
from fastapi import FastAPI

from fptq_export.errors import UserError
from fptq_export.runtime import Scheduler

__all__ = ["DrainingServer", "socket_for_address", "url_of_socket"]

_SEND_SECONDS = 5
"""For clients that read the end of their answers slowly."""


class DrainingServer(uvicorn.Server):
    """Ends without losing a text: after SIGTERM or SIGINT new ones get status 503, running ones are finished.

    The socket stays open meanwhile, so that a load balancer that does not know yet is told to go elsewhere. A second
    signal, or the end of the time, cancels what still runs.

    Args:
        app: Is served.
        scheduler: Is closed.
        drain_timeout: Seconds for running texts.
        verbose: Log every request.
        notify: Takes sentences for the one at the keyboard.
        started: Called once connections are taken.
    """

    def __init__(
        self,
        app: FastAPI,
        scheduler: Scheduler,
        *,
        drain_timeout: float,
        verbose: bool = False,
        notify: Callable[[str], None],
        started: Callable[[], None] = lambda: None,
    ) -> None:
        logs = {"log_level": "info"} if verbose else {"log_config": None}
        config = uvicorn.Config(
            app, access_log=verbose, server_header=False, timeout_graceful_shutdown=_SEND_SECONDS, **logs
        )
        super().__init__(config)
        self._scheduler = scheduler
        self._drain_timeout = drain_timeout
        self._notify = notify
        self._started = started
        self._stops = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take connections."""
        await super().startup(sockets)
        self._started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, on a signal. The first lets texts end, the second does not."""
        self._stops += 1
        name = signal.Signals(sig).name
        self._notify(f"{name}: running texts are finished; again to cancel them" if self._stops == 1 else name)
        threading.Thread(target=self.stop, args=(self._stops == 1,), daemon=True).start()

    def stop(self, drain: bool = True) -> None:
        """Close the scheduler, then end `run`. To be called from another thread than that of `run`."""
        self._scheduler.close(drain=drain, timeout=self._drain_timeout)
        self.should_exit = True


def socket_for_address(host: str, port: int) -> socket.socket:
    """A socket that is bound and takes no connections yet.

    Raises:
        UserError: The address is in use, or not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as opened:
            bound = opened.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            opened.pop_all()
    except OSError as error:
        cause = f"cannot be bound ({error.strerror or error})"
        raise UserError(f"{host}:{port}", cause, "choose another --host or --port; port 0 takes a free one") from error
    return bound


def url_of_socket(bound: socket.socket) -> str:
    """`http://127.0.0.1:8000`."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

"""The router process: opens everything, serves until it is told to stop, drains, closes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from flowprefill_sglang.errors import StartupError
from flowprefill_sglang.router.app import RouterApp
from flowprefill_sglang.router.config import RouterConfig
from flowprefill_sglang.router.dispatcher import Dispatcher
from flowprefill_sglang.router.exposition import metrics_app, metrics_routes
from flowprefill_sglang.router.log import event, set_up

log = logging.getLogger(__name__)
LISTEN_BACKLOG: Final = 2048


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the router drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Router:
    """A router inside a running event loop, for tests and for processes that run other things too.

    ``url``, ``metrics_url`` and ``worker_endpoint`` say where it listens once ``start`` has returned.
    """

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._servers: list[tuple[_Server, asyncio.Task[None]]] = []
        self.dispatcher: Dispatcher | None = None
        self.url = ""
        self.metrics_url = ""
        self.worker_endpoint = ""

    async def start(self) -> None:
        """Accept connections from now on. Raises StartupError when a port is taken."""
        config = self._config
        ports = [config.port] if config.prometheus_port is None else [config.port, config.prometheus_port]
        with contextlib.ExitStack() as on_failure:
            listeners = [on_failure.enter_context(_listen(config.host, port)) for port in ports]
            dispatcher = Dispatcher(config, rng=random.SystemRandom())
            await dispatcher.open()
            on_failure.pop_all()
        self.dispatcher = dispatcher
        self.worker_endpoint = dispatcher.links.endpoint
        self.url, self.metrics_url = _url(listeners[0]), _url(listeners[-1]) + "/metrics"
        routes = metrics_routes(dispatcher)
        apps: list[ASGIApp]
        if config.prometheus_port is None:
            apps = [RouterApp(dispatcher, routes)]
        else:
            apps = [RouterApp(dispatcher), metrics_app(routes)]
        for app, listener in zip(apps, listeners, strict=True):
            self._serve(app, listener)
        event(
            log, logging.INFO, "router_listening", url=self.url, workers=self.worker_endpoint, metrics=self.metrics_url
        )

    def _serve(self, app: ASGIApp, listener: socket.socket) -> None:
        server = _Server(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=75,
                backlog=LISTEN_BACKLOG,
            )
        )
        serving = asyncio.get_running_loop().create_task(server.serve(sockets=[listener]))
        self._servers.append((server, serving))

    async def stop(self, *, hurry: asyncio.Event | None = None) -> None:
        """Refuse new requests, let those running end, abort the rest, close. ``hurry`` cuts the waiting short."""
        if self.dispatcher is None:
            return
        hurry = hurry or asyncio.Event()
        dispatcher = self.dispatcher
        dispatcher.settling = True
        event(log, logging.INFO, "router_draining", running=len(dispatcher.running))
        await _wait(hurry, self._config.drain_settle_secs)
        dispatcher.closing = True
        loop = asyncio.get_running_loop()
        drained_by = loop.time() + self._config.shutdown_drain_secs
        while dispatcher.running and loop.time() < drained_by and not hurry.is_set():
            await _wait(hurry, 0.05)
        if dispatcher.running:
            event(log, logging.WARNING, "router_aborts_requests", running=len(dispatcher.running))
            dispatcher.end_all()
            await asyncio.sleep(0)
        for server, _ in self._servers:
            server.should_exit = True
            server.config.timeout_graceful_shutdown = 1
        await asyncio.gather(*(serving for _, serving in self._servers))
        await dispatcher.close()
        event(log, logging.INFO, "router_stopped")


def run(config: RouterConfig) -> int:
    """Serve until SIGINT or SIGTERM, then drain; a second signal cuts the draining short. Returns the exit status."""
    set_up(level=config.log_level, as_json=config.log_json)
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(_serve(config))
    except StartupError as error:
        print(f"flowprefill router: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(config: RouterConfig) -> None:
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    router = Router(config)
    await router.start()
    gc.freeze()  # modules and code need no further look: full collections would pause every request
    await stop.wait()
    await router.stop(hurry=hurry)


def loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    """The event loop that routers run on: uvloop's, or asyncio's own where there is none."""
    try:
        import uvloop
    except ImportError:  # not available on every platform
        return None
    loop: type[asyncio.AbstractEventLoop] = uvloop.Loop
    return loop


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise StartupError(f"cannot serve on {host}:{port}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(LISTEN_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise StartupError(f"cannot serve on {host}:{port}: {error.strerror}") from error
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _wait(event_: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event_.wait(), timeout_s)

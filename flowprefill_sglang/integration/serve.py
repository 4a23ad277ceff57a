"""Starting SGLang servers with our plugin: what ``flowprefill prefill`` and ``flowprefill decode`` do.

A prefill worker is SGLang's ordinary HTTP server in prefill mode, in this process and its children, with the link to
the router living on the same event loop; SGLang's own HTTP endpoint stays open for health checks and control requests.
A decode instance is stock SGLang.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from flowprefill_sglang.errors import FlowPrefillError, InternalError
from flowprefill_sglang.integration.platform import has_accelerator
from flowprefill_sglang.integration.plugin import require_loaded
from flowprefill_sglang.integration.prefill.refusals import refuse_what_cannot_work, refused_by_sglang
from flowprefill_sglang.integration.prefill.worker_events import count_metrics, published_endpoint, timeline_route
from flowprefill_sglang.prefill_worker.asgi_call import AsgiApp
from flowprefill_sglang.prefill_worker.config import WorkerConfig
from flowprefill_sglang.prefill_worker.event_feed import EventFeed
from flowprefill_sglang.prefill_worker.link import EngineHangs, Link
from flowprefill_sglang.prefill_worker.settings import SchedulerKind, publish

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

DEFAULT_FLAGS = ("--disaggregation-transfer-backend", "zmq")
"""Ahead of the user's flags, of which a later one of the same name wins: the built-in handoff needs no system
package."""

WORKER_FLAGS = ("--enable-metrics",)
"""Of every prefill worker: without it, ``/metrics`` would show neither SGLang's metrics nor ours."""

SCHEDULER_FLAGS = ("--disable-overlap-schedule",)
"""What FlowPrefill's scheduler needs of SGLang: overlap keeps one batch's state in buffers of the next one."""

CPU_SCHEDULER_FLAGS = ("--chunked-prefill-size", "16384")
"""Chunks are there for memory only, since a forward pass can stop anywhere; a longer prompt is computed in several
tasks. On a GPU SGLang's own default is right, since it sets memory aside for one chunk's activations. On a
CPU that default is small, and torch_native attention computes a cached prefix again for each chunk."""


def serve_prefill(config: WorkerConfig, sglang_arguments: Sequence[str]) -> int:
    """Run a prefill worker until it is told to stop; returns the process's exit status.

    ``sglang_arguments`` are SGLang's own flags. Raises BadInput for those that cannot work here, StartupError
    for what SGLang refuses.
    """
    config.scheduler.check()
    publish(config.scheduler)  # before the plugin is loaded, which reads it here and in SGLang's other processes
    defaults = _default_flags(config.scheduler.kind)
    server_args = _parse(["--disaggregation-mode", "prefill", *defaults, *sglang_arguments])
    from sglang.srt.arg_groups.overrides import resolving_view

    refuse_what_cannot_work(resolving_view(server_args), config.scheduler.kind)
    from sglang.srt.entrypoints.http_server import app, launch_server
    from sglang.srt.utils import kill_process_tree

    with published_endpoint() as endpoint:
        feed = EventFeed(endpoint)
        link = _LinkOnTheServersLoop(config, app, feed)
        app.router.lifespan_context = link.around(app.router.lifespan_context)
        app.router.routes.append(timeline_route(config.name, feed))
        try:
            launch_server(server_args, launch_callback=link.server_is_ready)
        except SystemExit:
            if link.failure is None:
                raise
        finally:
            kill_process_tree(os.getpid(), include_parent=False)
    if link.failure is not None:
        raise link.failure
    return 0


def serve_decode(sglang_arguments: Sequence[str]) -> int:
    """Run a decode instance until it is told to stop: stock SGLang, whose plugin loader brings our transfer backend."""
    server_args = _parse(["--disaggregation-mode", "decode", *DEFAULT_FLAGS, *sglang_arguments])
    from sglang.launch_server import run_server
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
    return 0


def _default_flags(kind: SchedulerKind) -> tuple[str, ...]:
    if kind is SchedulerKind.STOCK:
        return (*DEFAULT_FLAGS, *WORKER_FLAGS)
    cpu_flags = () if has_accelerator() else CPU_SCHEDULER_FLAGS
    return (*DEFAULT_FLAGS, *WORKER_FLAGS, *SCHEDULER_FLAGS, *cpu_flags)


def _parse(arguments: Sequence[str]) -> ServerArgs:
    """SGLang's flags to its settings, with all plugins loaded and ours verified. Raises StartupError."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    require_loaded()
    from sglang.srt.server_args import prepare_server_args

    server_args = prepare_server_args(list(arguments))
    with refused_by_sglang():
        server_args.resolve_once()
    return server_args


class _LinkOnTheServersLoop:
    """Ties the lives of the link and of the event feed to the server's: the feed's is the server's own, the link starts
    once SGLang is warm and ends before the server does."""

    def __init__(self, config: WorkerConfig, app: AsgiApp, feed: EventFeed) -> None:
        self._config = config
        self._app = app
        self._feed = feed
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = asyncio.Event()
        self.failure: FlowPrefillError | None = None

    def server_is_ready(self) -> None:
        """SGLang's launch callback; comes on its warm-up thread, after the lifespan has begun."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._ready.set)

    def around(self, lifespan: Any) -> Any:  # Starlette's lifespan factory, untyped upstream
        """``lifespan`` with the link inside."""

        @asynccontextmanager
        async def with_link(app: Any) -> AsyncIterator[Any]:
            self._loop = asyncio.get_running_loop()
            async with lifespan(app) as state:
                count_metrics(self._feed)
                self._feed.open()
                task = self._loop.create_task(self._serve_link(), name="flowprefill-link")
                try:
                    yield state
                finally:
                    task.cancel()
                    await asyncio.wait([task])
                    self._feed.close()

        return with_link

    async def _serve_link(self) -> None:
        from flowprefill_sglang.integration.engine import SGLangEngine

        await self._ready.wait()
        engine = SGLangEngine(self._app)
        try:
            await Link(self._config, engine, self._feed).run()
        except EngineHangs as error:
            # SGLang would wait for the requests that it has, and then for the process that hangs.
            self.failure = error
            engine.give_up()
            raise SystemExit(1) from error
        except FlowPrefillError as error:
            self.failure = error
        except Exception as error:
            logger.exception("the link to the router broke; this worker stops")
            self.failure = InternalError(f"the link to the router broke: {type(error).__name__}: {error}")
        if not engine.is_stopping():
            engine.stop()  # without a link, nobody would send it anything

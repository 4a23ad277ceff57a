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

from flowprefill_sglang.errors import BadInput, FlowPrefillError, InternalError, StartupError
from flowprefill_sglang.integration.plugin import require_loaded
from flowprefill_sglang.prefill_worker.asgi_call import AsgiApp
from flowprefill_sglang.prefill_worker.config import WorkerConfig
from flowprefill_sglang.prefill_worker.link import Link

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

DEFAULT_FLAGS = ("--disaggregation-transfer-backend", "zmq")
"""Ahead of the user's flags, of which a later one of the same name wins: the built-in handoff needs no system
package."""


def serve_prefill(config: WorkerConfig, sglang_arguments: Sequence[str]) -> int:
    """Run a prefill worker until it is told to stop; returns the process's exit status.

    ``sglang_arguments`` are SGLang's own flags. Raises BadInput for those that cannot work here, StartupError
    for what SGLang refuses, PeerFault when the router refuses this worker.
    """
    server_args = _parse(["--disaggregation-mode", "prefill", *DEFAULT_FLAGS, *sglang_arguments])
    _refuse_what_cannot_work(server_args)
    from sglang.srt.entrypoints.http_server import app, launch_server
    from sglang.srt.utils import kill_process_tree

    link = _LinkOnTheServersLoop(config, app)
    app.router.lifespan_context = link.around(app.router.lifespan_context)
    try:
        launch_server(server_args, launch_callback=link.server_is_ready)
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


def _parse(arguments: Sequence[str]) -> ServerArgs:
    """SGLang's flags to its settings, with all plugins loaded and ours verified. Raises StartupError."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    require_loaded()
    from sglang.srt.server_args import prepare_server_args

    server_args = prepare_server_args(list(arguments))
    try:
        server_args.resolve_once()
    except (ValueError, AssertionError, NotImplementedError, OSError) as error:
        raise StartupError(f"SGLang refuses these settings: {error}") from error
    return server_args


def _refuse_what_cannot_work(server_args: ServerArgs) -> None:
    from sglang.srt.arg_groups.overrides import resolving_view

    settings = resolving_view(server_args)
    refusals = {
        "--tokenizer-worker-num above 1: the link to the router lives in SGLang's only HTTP process; start more "
        "prefill workers instead": settings.tokenizer_worker_num > 1,
        "--use-ray: SGLang's Ray engine loads no plugins; run whole workers under Ray instead": settings.use_ray,
        "--enable-http2: the link needs SGLang's uvicorn server; put HTTP/2 in front of the router": (
            settings.enable_http2
        ),
        "--grpc-mode or --smg-grpc-mode: the link calls SGLang's HTTP handlers": (
            settings.smg_grpc_mode or settings.grpc_mode
        ),
        "--encoder-only: an encoder does not prefill": settings.encoder_only,
    }
    for reason, applies in refusals.items():
        if applies:
            raise BadInput(f"a FlowPrefill prefill worker cannot run with {reason}")


class _LinkOnTheServersLoop:
    """Ties the link's life to the server's: it starts once SGLang is warm and ends before the server does."""

    def __init__(self, config: WorkerConfig, app: AsgiApp) -> None:
        self._config = config
        self._app = app
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
                task = self._loop.create_task(self._serve_link(), name="flowprefill-link")
                try:
                    yield state
                finally:
                    task.cancel()
                    await asyncio.wait([task])

        return with_link

    async def _serve_link(self) -> None:
        from flowprefill_sglang.integration.engine import SGLangEngine

        await self._ready.wait()
        engine = SGLangEngine(self._app)
        try:
            await Link(self._config, engine).run()
        except FlowPrefillError as error:
            self.failure = error
        except Exception as error:
            logger.exception("the link to the router broke; this worker stops")
            self.failure = InternalError(f"the link to the router broke: {type(error).__name__}: {error}")
        if not engine.is_stopping():
            engine.stop()  # without a link, nobody would send it anything

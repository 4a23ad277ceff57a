"""SGLang's running HTTP application, as a prefill worker's link sees it (the ``Engine`` of ``prefill_worker.link``)."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
from collections.abc import Sequence
from typing import Any

from flowprefill_sglang import __version__
from flowprefill_sglang.errors import PeerFault
from flowprefill_sglang.integration.detokenizer import Questions
from flowprefill_sglang.integration.prefill.request_terms import dispatched
from flowprefill_sglang.prefill_worker.asgi_call import AsgiApp, call
from flowprefill_sglang.prefill_worker.config import WorkerConfig
from flowprefill_sglang.prefill_worker.signs_of_life import Part
from flowprefill_sglang.wire.framing import Buffer
from flowprefill_sglang.wire.messages import SPOKEN, Dispatch, Hello, Limits


class SGLangEngine:
    """Calls SGLang's own handlers in this process. Used on the server's event loop only."""

    def __init__(self, app: AsgiApp) -> None:
        from sglang.srt.entrypoints.http_server import get_global_state

        self._app = app
        self._tokenizer_manager = get_global_state().tokenizer_manager
        self._detokenizer = Questions(self._tokenizer_manager)
        self._controls = [
            one
            for name, one in vars(self._tokenizer_manager).items()
            if name.endswith("_communicator") and name != "get_internal_state_communicator"
        ]

    async def request(
        self, dispatch: Dispatch, received_at: float, body: Buffer, disconnected: asyncio.Event
    ) -> tuple[int, str, bytes]:
        """What SGLang's endpoint at the dispatch's path answers to a POST of ``body``: status, content type, body."""
        with dispatched(dispatch, received_at):
            return await call(self._app, "POST", dispatch.path, dispatch.headers, body, disconnected)

    def abort(self, rids: Sequence[str]) -> None:
        """Abort the prompts of these names. Those that SGLang does not know yet, or any more, are ignored."""
        for rid in rids:
            self._tokenizer_manager.abort_request(rid)

    def is_stopping(self) -> bool:
        """Whether SGLang was told to stop (SIGTERM) and is finishing what it has."""
        return bool(self._tokenizer_manager.gracefully_exit)

    def stop(self) -> None:
        """Stop the server the way an operator would."""
        os.kill(os.getpid(), signal.SIGTERM)

    async def sign_of_life(self, part: Part) -> None:
        """Return when this process has answered. The scheduler takes the question in whatever it does and however it is
        paused, at its next operator boundary, and computes nothing for it, unlike for ``/health``."""
        if part is Part.SCHEDULER:
            await self._tokenizer_manager.get_internal_state()
        else:
            await self._detokenizer.ask()

    def is_under_control(self) -> bool:
        """Whether a control request is under way: new weights, a pause, a profile. Any may take minutes."""
        manager = self._tokenizer_manager
        update = manager.model_update_result
        return (update is not None and not update.done()) or any(one._queueing_lock.locked() for one in self._controls)

    def give_up(self) -> None:
        """Leave SGLang's processes to whoever ends them by force, without SGLang's being alarmed."""
        if self._tokenizer_manager._subprocess_watchdog is not None:
            self._tokenizer_manager._subprocess_watchdog.stop()

    async def hello(self, config: WorkerConfig) -> Hello:
        """The facts that the router needs, as SGLang reports them. Raises PeerFault when it does not."""
        status, _, body = await call(self._app, "GET", "/server_info", _authorization(), b"", asyncio.Event())
        if status != 200:
            raise PeerFault(f"SGLang answered {status} to GET /server_info: {body[:200].decode(errors='replace')}")
        info: dict[str, Any] = json.loads(body)  # SGLang's settings, hundreds of keys of every type
        state = info["internal_states"][0]
        host = _reachable(info["host"])
        return Hello(
            protocol=SPOKEN.newest,
            oldest_protocol=SPOKEN.oldest,
            name=config.name,
            incarnation=secrets.token_hex(8),
            version=__version__,
            model=info["served_model_name"],
            http_url=f"http://{host}:{info['port']}",
            bootstrap_host=host,
            bootstrap_port=info["disaggregation_bootstrap_port"],
            transfer_backend=info["disaggregation_transfer_backend"],
            limits=Limits(
                max_context_tokens=self._tokenizer_manager.context_len,
                max_kv_tokens=info["max_total_num_tokens"],
                page_tokens=info["page_size"],
                max_running_requests=state["effective_max_running_requests_per_dp"],
            ),
        )


def _authorization() -> list[tuple[str, str]]:
    from sglang.srt.runtime_context import get_serving

    key = get_serving().admin_api_key or get_serving().api_key
    return [("authorization", f"Bearer {key}")] if key else []


def _reachable(host: str) -> str:
    """The address under which others reach a server bound to ``host``."""
    if host not in ("0.0.0.0", "::", ""):
        return host
    from sglang.srt.utils.network import get_local_ip_auto

    return str(get_local_ip_auto())

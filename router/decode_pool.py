"""The decode side: connections to decode instances, and the checks that keep the picture of them true.

Run by the router's event loop, one small task an instance. The hot path (``Origin.send``) and everything else (an
aiohttp session: health checks, aborts, control requests) do not share connections, so that a check never waits for a
request.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

import aiohttp

from flowprefill_sglang.router.config import RouterConfig
from flowprefill_sglang.router.decode_registry import DecodeFacts, DecodeInstance, DecodeRegistry
from flowprefill_sglang.router.http_client import Origin
from flowprefill_sglang.router.log import event
from flowprefill_sglang.router.states import WorkerState

log = logging.getLogger(__name__)

JOINING_CHECK_INTERVAL_S: Final = 0.5
"""How often an instance that is not ready is checked: start-up time is what people wait for."""


class NotADecodeInstance(Exception):
    """The URL answers, but not as a decode instance should."""


class DecodePool:
    """Decode instances with their connections."""

    def __init__(self, config: RouterConfig) -> None:
        self.registry = DecodeRegistry(failure_threshold=config.health_failure_threshold)
        self._config = config
        self._origins: dict[str, Origin] = {}
        self._checks: dict[str, asyncio.Task[None]] = {}
        self._check_now: dict[str, asyncio.Event] = {}
        self._aborts: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        headers = {"authorization": f"Bearer {self._config.api_key}"} if self._config.api_key else None
        self._session = aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0))
        for url in self._config.decode:
            self.add(url)

    async def close(self) -> None:
        """Let aborts that are under way leave, then close every connection."""
        if self._aborts:
            await asyncio.wait(self._aborts, timeout=1.0)
        tasks = [*self._checks.values(), *self._aborts]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for origin in self._origins.values():
            origin.close()
        if self._session is not None:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        """For control requests to any worker."""
        assert self._session is not None, "the pool is not open"
        return self._session

    def add(self, url: str) -> DecodeInstance:
        """Take an instance in and start checking it; one that is known stays as it is."""
        instance = self.registry.add(url)
        if url not in self._origins:
            self._origins[url] = Origin(url, connect_timeout_s=self._config.connect_timeout_secs)
            self._check_now[url] = asyncio.Event()
            self._checks[url] = asyncio.get_running_loop().create_task(self._keep_checking(instance))
        return instance

    def remove(self, url: str) -> bool:
        """Send no more requests there. Those running end as they would have. False when it is not known."""
        if self.registry.remove(url) is None:
            return False
        self._checks.pop(url).cancel()
        del self._origins[url], self._check_now[url]
        return True

    def origin(self, instance: DecodeInstance) -> Origin | None:
        """Its connections; None when it has just been removed."""
        return self._origins.get(instance.url)

    def abort(self, instance: DecodeInstance, rids: Iterable[str]) -> None:
        """Tell an instance to stop working on these requests, without waiting for it."""
        task = asyncio.get_running_loop().create_task(self._abort(instance.url, list(rids)))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    def unreachable(self, instance: DecodeInstance, reason: str) -> None:
        """A request could not be delivered: do not wait for the next check to believe it."""
        self._log_change(instance, self.registry.on_failure(instance, reason, certain=True))

    def suspect(self, instance: DecodeInstance) -> None:
        """A connection broke: check the instance now."""
        if (check_now := self._check_now.get(instance.url)) is not None:
            check_now.set()

    # ---- inside --------------------------------------------------------------------------------------------------

    async def _abort(self, url: str, rids: list[str]) -> None:
        for rid in rids:
            try:
                async with self.session.post(
                    f"{url}/abort_request", json={"rid": rid}, timeout=aiohttp.ClientTimeout(total=5.0)
                ) as answer:
                    await answer.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                event(log, logging.INFO, "abort_not_delivered", url=url, rid=rid, error=_text(error))
                return  # it is gone or hangs; its connection was closed already

    async def _keep_checking(self, instance: DecodeInstance) -> None:
        check_now = self._check_now[instance.url]
        while True:
            check_now.clear()
            gone = False
            try:
                async with asyncio.timeout(self._config.health_check_timeout_secs):
                    changed = self.registry.on_healthy(instance, await self._check(instance))
            except TimeoutError:  # which is an OSError, too
                changed = self.registry.on_failure(instance, "its health check timed out")
            except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError, NotADecodeInstance) as error:
                gone = isinstance(error, aiohttp.ClientConnectorError)
                changed = self.registry.on_failure(instance, _text(error), certain=gone)
            self._log_change(instance, changed)
            if changed and instance.state is WorkerState.DEAD and not gone:
                # It hangs with its connections open. What it owes is tried elsewhere, or fails, now and not in hours.
                self._origins[instance.url].close()
            ready = instance.state is WorkerState.READY
            pause_s = self._config.health_check_interval_secs if ready else JOINING_CHECK_INTERVAL_S
            with suppress(TimeoutError):
                await asyncio.wait_for(check_now.wait(), pause_s)

    async def _check(self, instance: DecodeInstance) -> DecodeFacts:
        if instance.state is not WorkerState.READY:
            info = await self._get_json(instance, "/model_info")
            mode = info.get("disaggregation_mode")
            if mode not in ("decode", None):
                raise NotADecodeInstance(f"it runs with --disaggregation-mode {mode}, not decode")
            server = await self._get_json(instance, "/server_info")
            backend, version = server.get("disaggregation_transfer_backend"), server.get("version")
        else:
            assert instance.facts is not None
            backend, version = instance.facts.transfer_backend, instance.facts.version
        cards = tuple((await self._get_json(instance, "/v1/models"))["data"])
        async with self.session.get(f"{instance.url}/health") as answer:
            if answer.status != 200:
                raise NotADecodeInstance(f"/health answers {answer.status}")
        model = next((card["id"] for card in cards if not card.get("parent")), None)
        if model is None:
            raise NotADecodeInstance("/v1/models names no model")
        return DecodeFacts(
            model=model,
            names=frozenset(card["id"] for card in cards),
            cards=cards,
            transfer_backend=backend,
            version=version,
        )

    async def _get_json(self, instance: DecodeInstance, path: str) -> dict[str, Any]:
        async with self.session.get(instance.url + path) as answer:
            if answer.status != 200:
                raise NotADecodeInstance(f"{path} answers {answer.status}")
            document = json.loads(await answer.read())
        if not isinstance(document, dict):
            raise NotADecodeInstance(f"{path} answers no JSON object")
        return document

    @staticmethod
    def _log_change(instance: DecodeInstance, changed: bool) -> None:
        if changed:
            event(
                log, logging.INFO, "worker_state", worker=instance.url, type="decode", state=instance.state,
                reason=instance.reason,
            )  # fmt: skip


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__

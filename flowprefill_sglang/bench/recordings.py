"""What the prefill workers behind a router remember of their last seconds."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import aiohttp
import msgspec

from flowprefill_sglang.errors import PeerFault
from flowprefill_sglang.observe import recording
from flowprefill_sglang.observe.recording import Recording

TIMELINE_PATH = "/flowprefill/timeline"
_UNREACHABLE_STATES = ("joining", "dead")


class Workers:
    """The prefill workers of one router, asked over HTTP; workers must be reachable from here too."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 30.0) -> None:
        """``api_key`` is the router's, and that of the workers, as ``flowprefill up`` sets them."""
        self._url = url.rstrip("/")
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def addresses(self) -> dict[str, str]:
        """HTTP address of each prefill worker that the router is in touch with, by name. Raises PeerFault."""
        async with self._session() as session:
            body = await _get(session, f"{self._url}/workers")
        try:
            listed: Any = msgspec.json.decode(body)["workers"]  # any JSON document
            return {
                str(worker["name"]): str(worker["url"])
                for worker in listed
                if worker["type"] == "prefill" and worker["state"] not in _UNREACHABLE_STATES
            }
        except (msgspec.DecodeError, LookupError, TypeError) as error:
            raise PeerFault(f"{self._url}/workers is not a FlowPrefill router's list of workers") from error

    async def recordings(self, seconds: float) -> list[Recording]:
        """What each of them did in the last ``seconds``. Raises PeerFault when one does not say."""
        addresses = await self.addresses()
        async with self._session() as session:
            return list(
                await asyncio.gather(*(_recording(session, url, seconds) for _, url in sorted(addresses.items())))
            )

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(timeout=self._timeout, headers=self._headers)


async def _recording(session: aiohttp.ClientSession, worker_url: str, seconds: float) -> Recording:
    url = f"{worker_url}{TIMELINE_PATH}?seconds={math.ceil(seconds)}"
    body = await _get(session, url)
    try:
        return recording.decode(body)
    except msgspec.DecodeError as error:
        raise PeerFault(f"{url} did not answer with a timeline: {error}") from error


async def _get(session: aiohttp.ClientSession, url: str) -> bytes:
    try:
        async with session.get(url) as response:
            if response.status != 200:
                raise PeerFault(f"{url} answered with HTTP {response.status}")
            return await response.read()
    except TimeoutError as error:
        raise PeerFault(f"no answer from {url} within {session.timeout.total:g} s") from error
    except aiohttp.ClientError as error:
        raise PeerFault(f"no answer from {url}: {error}") from error

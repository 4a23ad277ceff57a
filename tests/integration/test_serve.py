"""The link's life inside the server's, with stand-ins for SGLang; and flags that a prefill worker refuses."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from flowprefill_sglang.errors import InternalError, PeerFault
from flowprefill_sglang.integration import engine, serve
from flowprefill_sglang.prefill_worker.config import WorkerConfig
from flowprefill_sglang.prefill_worker.event_feed import EventFeed
from flowprefill_sglang.prefill_worker.link import EngineHangs

CONFIG = WorkerConfig(router="tcp://127.0.0.1:1", name="w")


class StandInEngine:
    """Cannot say what it is, for the reason given."""

    error: Exception

    def __init__(self, app: object) -> None:
        self.stopped = False
        type(self).last = self

    async def hello(self, config: WorkerConfig) -> None:
        raise self.error

    def is_stopping(self) -> bool:
        return self.stopped

    def stop(self) -> None:
        self.stopped = True


@asynccontextmanager
async def lifespan(app: object) -> AsyncIterator[dict[str, int]]:
    yield {"state": 1}


@pytest.mark.parametrize(
    ("error", "kind"),
    [(PeerFault("SGLang answered 500"), PeerFault), (KeyError("port"), InternalError)],
)
def test_a_worker_without_a_link_stops(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, kind: type[Exception]
) -> None:
    class Fresh(StandInEngine):
        pass

    Fresh.error = error
    monkeypatch.setattr(engine, "SGLangEngine", Fresh)

    async def scenario() -> serve._LinkOnTheServersLoop:
        link = serve._LinkOnTheServersLoop(CONFIG, object(), EventFeed(f"ipc://{tmp_path}/events"))
        async with link.around(lifespan)(object()) as state:
            assert state == {"state": 1}
            await asyncio.to_thread(link.server_is_ready)
            async with asyncio.timeout(10):
                while not link.failure:  # noqa: ASYNC110 - set by the link's own task
                    await asyncio.sleep(0.001)
        return link

    link = asyncio.run(scenario())
    assert isinstance(link.failure, kind)
    assert Fresh.last.stopped, "nobody would send it anything"


def test_a_worker_whose_scheduler_hangs_does_not_wait_for_sglang(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Hung(StandInEngine):
        error = EngineHangs("its scheduler process has not answered")
        given_up = False

        def give_up(self) -> None:
            self.given_up = True

    monkeypatch.setattr(engine, "SGLangEngine", Hung)
    link = serve._LinkOnTheServersLoop(CONFIG, object(), EventFeed(f"ipc://{tmp_path}/events"))

    async def scenario() -> None:
        async with link.around(lifespan)(object()):
            await asyncio.to_thread(link.server_is_ready)
            await asyncio.Event().wait()

    with pytest.raises(SystemExit):
        asyncio.run(scenario())
    assert isinstance(link.failure, EngineHangs)
    assert (Hung.last.given_up, Hung.last.stopped) == (True, False)


def test_a_server_that_ends_before_it_is_ready_ends_the_link_and_the_feed(tmp_path: Path) -> None:
    async def scenario() -> set[asyncio.Task]:
        link = serve._LinkOnTheServersLoop(CONFIG, object(), EventFeed(f"ipc://{tmp_path}/events"))
        async with link.around(lifespan)(object()):
            pass
        assert link.failure is None
        assert link._feed._context is None
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(scenario()) == set()

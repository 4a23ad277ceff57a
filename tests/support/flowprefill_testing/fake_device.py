"""A device that executes what is launched in order, behind the host's back, on a clock that only the test moves."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, eq=False)
class FakeMark:
    at: float
    """When everything before it has ended, or it was recorded if that was later."""


@dataclass
class FakeDevice:
    """``Marks`` and what is needed around them. Host and device share the clock."""

    now: float = 1_000.0
    oversleep_s: float = 0.0
    """How much longer each sleep takes than it was asked for."""
    free_at: float = 0.0
    idle_s: float = 0.0
    """How long it had nothing to do between two launches."""
    slept_s: list[float] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept_s.append(seconds)
        self.now += seconds + self.oversleep_s

    def launch(self, seconds: float) -> None:
        if self.free_at:
            self.idle_s += max(0.0, self.now - self.free_at)
        self.free_at = max(self.free_at, self.now) + seconds

    def in_flight_s(self) -> float:
        return max(0.0, self.free_at - self.now)

    def record(self) -> FakeMark:
        return FakeMark(max(self.now, self.free_at))

    def is_reached(self, mark: FakeMark) -> bool:
        return self.now >= mark.at

    def wait(self, mark: FakeMark) -> None:
        self.now = max(self.now, mark.at)

    def elapsed_s(self, earlier: FakeMark, later: FakeMark) -> float:
        assert self.is_reached(earlier)
        assert self.is_reached(later)
        return later.at - earlier.at

"""Where the processes of a tensor-parallel worker meet: sockets between them and the memory that they share.

The leader listens in a folder that only this user may enter and that is gone once everybody has come. The memory has no
name at all (``memfd_create``): each follower gets its descriptor through its socket. So nothing is left behind,
whichever process is killed when.
"""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Final

from flowprefill_sglang.errors import PeerFault, StartupError
from flowprefill_sglang.prefill_worker.lease import FollowerLease, LeaderLease, Patience, words_for
from flowprefill_sglang.prefill_worker.ranks import Follower, Leader, Ranks

PATIENCE_S: Final = 300.0
"""How long a rank waits for another at a boundary: SGLang's own patience with a forward pass (``--watchdog-timeout``).
A rank that has died is noticed at once; this is for one that is alive and stuck."""
MEETING_S: Final = 60.0
"""How long ranks may take to connect to the leader, once it listens."""


def lead(count: int, publish: Callable[[str | None], object]) -> tuple[Leader, LeaderLease]:
    """Wait for the ``count`` - 1 followers. ``publish`` tells all of them the path at which this rank listens, or None
    that it cannot. Raises StartupError."""
    with (
        tempfile.TemporaryDirectory(prefix="flowprefill-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
    ):
        path = f"{folder}/ranks"
        try:
            listener.bind(path)
        except OSError as error:
            publish(None)
            raise StartupError(f"cannot listen at {path} for the other ranks ({error}); set TMPDIR") from error
        listener.listen(count)
        listener.settimeout(MEETING_S)
        publish(path)
        memory = os.memfd_create("flowprefill-lease", os.MFD_CLOEXEC)
        os.ftruncate(memory, 8 * words_for(count - 1))
        ranks = Leader(_accept(listener, count, memory))
        return ranks, LeaderLease(_words(memory), count - 1, _patience(ranks, "a follower"))


def follow(rank: int, count: int, path: str | None) -> tuple[Follower, FollowerLease]:
    """Connect to the leader at ``path``, as rank ``rank`` of ``count``. Raises StartupError."""
    if path is None:
        raise StartupError("the leader of this tensor-parallel group cannot listen for this rank; its log says why")
    leader = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        leader.connect(path)
        leader.send(bytes([rank]))
        _, files, _, _ = socket.recv_fds(leader, 16, 1)
    except OSError as error:
        leader.close()
        raise StartupError(f"cannot reach the leader of this tensor-parallel group at {path}: {error}") from error
    if not files:
        leader.close()
        raise StartupError("the leader of this tensor-parallel group has ended; its log says why")
    ranks = Follower(rank, count, leader)
    return ranks, FollowerLease(_words(files[0]), rank, _patience(ranks, "the leader"))


def _accept(listener: socket.socket, count: int, memory: int) -> dict[int, socket.socket]:
    followers: dict[int, socket.socket] = {}
    try:
        while len(followers) < count - 1:
            follower, _ = listener.accept()
            follower.settimeout(MEETING_S)
            followers[follower.recv(1)[0]] = follower
            socket.send_fds(follower, [b"lease"], [memory])
            follower.settimeout(None)
    except (OSError, IndexError) as error:
        for follower in followers.values():
            follower.close()
        os.close(memory)
        raise StartupError(f"of {count - 1} ranks only {sorted(followers)} have reached their leader") from error
    return dict(sorted(followers.items()))


def _words(memory: int) -> memoryview:
    """The memory as 64-bit words. Closes the descriptor; the mapping stays as long as the words are in use."""
    try:
        mapped = mmap.mmap(memory, 0)
    finally:
        os.close(memory)
    return memoryview(mapped).cast("Q")


def _patience(ranks: Ranks, whom: str) -> Patience:
    return Patience(
        timeout_s=PATIENCE_S,
        check=ranks.check,
        clock=time.monotonic,
        give_way=os.sched_yield,
        sleep=time.sleep,
        too_late=lambda: PeerFault(
            f"{whom} of this tensor-parallel worker has not come to a boundary for {PATIENCE_S:.0f} s"
        ),
    )

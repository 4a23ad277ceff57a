"""The mailbox of a polling thread."""

from __future__ import annotations

import os
import select

import pytest

from flowprefill_sglang.kv.mailbox import Mailbox


def is_readable(mailbox: Mailbox) -> bool:
    return bool(select.select([mailbox.fileno()], [], [], 0)[0])


def test_calls_run_in_order_and_wake_the_poll() -> None:
    mailbox, done = Mailbox(), []
    assert not is_readable(mailbox)
    for number in range(100_000):  # more than the pipe holds
        mailbox.post(lambda number=number: done.append(number))
    assert is_readable(mailbox)
    mailbox.run_all()
    assert done == list(range(100_000))
    mailbox.close()


def test_a_failing_call_does_not_take_the_later_ones_with_it() -> None:
    mailbox, done = Mailbox(), []
    mailbox.post(lambda: 1 / 0)
    mailbox.post(lambda: done.append(1))
    with pytest.raises(ZeroDivisionError):
        mailbox.run_all()
    mailbox.run_all()
    assert done == [1]
    mailbox.close()


def test_posting_after_the_end_writes_to_nobody_elses_file() -> None:
    mailbox = Mailbox()
    mailbox.close()
    read_end, write_end = os.pipe()  # takes the two numbers that have just become free
    mailbox.post(lambda: None)
    assert not select.select([read_end], [], [], 0)[0]
    os.close(read_end)
    os.close(write_end)

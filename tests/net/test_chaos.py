"""The bad link is bad in the way that was asked for, and in no other."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from snapchain.errors import Unavailable
from snapchain.host.channel import Channel
from tests.net.chaos import Fault, Link, chaos
from tests.waiting import HANG

SENT = os.urandom(300_000)


@contextmanager
def ends(*, up: Fault | None = None, down: Fault | None = None) -> Iterator[tuple[socket.socket, socket.socket, Link]]:
    with ExitStack() as stack:
        here, there, link = stack.enter_context(chaos(up=up, down=down))
        yield stack.enter_context(socket.socket(fileno=here)), stack.enter_context(socket.socket(fileno=there)), link


def through(up: Fault) -> bytes:
    """What arrives of SENT."""
    with ends(up=up) as (here, there, _):

        def send() -> None:
            try:
                here.sendall(SENT)
                here.shutdown(socket.SHUT_WR)
            except OSError:
                return

        thread = threading.Thread(target=send)
        thread.start()
        got = bytearray()
        while piece := there.recv(1 << 16):
            got += piece
        thread.join()
        return bytes(got)


@pytest.mark.parametrize("piece", [1 << 16, 1000])
def test_without_a_fault_all_arrives(piece: int) -> None:
    assert through(Fault(piece=piece)) == SENT


@pytest.mark.parametrize("at", [1, 999, 65_536, 299_999])
def test_cut(at: int) -> None:
    assert through(Fault(cut_at=at)) == SENT[:at]


@pytest.mark.parametrize("bit", [0, 7, 65_536 * 8, 300_000 * 8 - 1])
def test_one_bit_is_flipped(bit: int) -> None:
    number = int.from_bytes(SENT, "little") ^ int.from_bytes(through(Fault(flip_at=bit, piece=777)), "little")
    assert number == 1 << bit


def test_bytes_are_lost() -> None:
    assert through(Fault(lose=(500, 70_000), piece=300)) == SENT[:500] + SENT[70_000:]


def test_a_cut_is_seen_at_both_ends_and_in_both_directions() -> None:
    with chaos(down=Fault(cut_at=10)) as (here, there, _):
        near, far = Channel(here, here, peer="far", patience=HANG), Channel(there, there, peer="near", patience=HANG)
        far.write(SENT[:20])
        assert near.read(100) == SENT[:10]
        assert near.read(100) == b""
        for channel in (near, far):
            with pytest.raises(Unavailable, match="closed by the other side"):
                channel.write(SENT * 30)
        near.close()
        far.close()


def test_a_stall_lasts_until_it_is_released() -> None:
    with chaos(up=Fault(stall_at=10)) as (here, there, link):
        near, far = Channel(here, here, peer="far"), Channel(there, there, peer="near", patience=0.2)
        near.write(SENT[:30])
        assert far.read(100) == SENT[:10]
        assert link.stalled.wait(HANG)
        with pytest.raises(Unavailable, match="nothing came"):
            far.read(100)
        link.release()
        assert far.read(100, patience=HANG) == SENT[10:30]
        far.write(b"and back")
        assert near.read(100) == b"and back"
        near.close()
        far.close()


def test_nothing_is_left_when_a_test_gives_up_in_a_stall() -> None:
    before = threading.active_count()
    with ends(up=Fault(stall_at=1)) as (here, _, link):
        here.sendall(b"xy")
        assert link.stalled.wait(HANG)
    assert threading.active_count() == before

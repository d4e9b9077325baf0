"""Ask QEMU or libvirt to pause a guest whose lease is about to run out, so that the guest's own clock stands still.

It is a courtesy: the guards stop the guest whatever comes of it.  A request that is not answered may be carried out
later, so the guest is asked to resume until QEMU has answered that.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from snapchain.errors import SnapchainError
from snapchain.guest.pausing import pause, unpause
from snapchain.host.deadman import clock
from snapchain.ops.watch.door import GuestDoor


class Courtesy:
    """is_pausing: whether the guest was asked to pause, and has not resumed for certain"""

    def __init__(self, door: GuestDoor) -> None:
        self._door = door
        self._worker = ThreadPoolExecutor(1, "pause")
        self._pause: Future[bool | None] | None = None
        self._resume: Future[bool] | None = None
        self.is_pausing = False

    def ask_to_pause(self, seconds: float) -> None:
        """seconds: until it is stopped anyway"""
        self.is_pausing = True
        self._pause = self._worker.submit(_paused, self._door, seconds)

    def ask_to_resume(self, seconds: float) -> None:
        """Called again and again until `is_pausing` is False. seconds: for an answer"""
        if any(each is not None and not each.done() for each in (self._pause, self._resume)):
            return
        was_off = self._pause is not None and self._pause.result() is False
        has_resumed = self._resume is not None and self._resume.result()
        self._pause = self._resume = None
        if was_off or has_resumed:
            self.is_pausing = False
            return
        self._resume = self._worker.submit(_resumed, self._door, seconds)

    def close(self, *, resumes: bool, seconds: float) -> None:
        """resumes: let it run on. seconds: for an answer"""
        self._worker.shutdown(wait=False, cancel_futures=True)
        if resumes and self.is_pausing:
            _resumed(self._door, seconds)


def _paused(door: GuestDoor, seconds: float) -> bool | None:
    """Whether it was paused now; False: it was not asked, or did not run; None where that is not known."""
    until = clock() + seconds
    try:
        with door.turn(seconds) as is_mine:
            left = until - clock()
            return is_mine and left > 0 and pause(door.address, seconds=left)
    except SnapchainError:
        return None


def _resumed(door: GuestDoor, seconds: float) -> bool:
    """Whether QEMU has answered: then it has nothing left to do of what it was asked before."""
    try:
        with door.turn(seconds) as is_mine:
            if is_mine:
                unpause(door.address, seconds=seconds)
            return is_mine
    except SnapchainError:
        return False

"""What the receiving side says, and that it goes on saying that it is alive."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from snapchain.errors import SnapchainError
from snapchain.host.batches import Buffer
from snapchain.host.remote_channel import Channel
from snapchain.replica.stream.frames import FrameWriter, Kind

BEAT_SECONDS = 10.0


class Voice(FrameWriter):
    """What this side says; several threads may. Nothing at all to a sender that does not listen."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self._lock = threading.Lock()
        self.heard = False

    def send(self, kind: Kind, *body: Buffer) -> None:
        """Raises what Channel.write raises."""
        if self.heard:
            with self._lock:
                super().send(kind, *body)

    def say(self, kind: Kind, body: bytes = b"") -> None:
        """As `send`."""
        self.send(kind, body)

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Say now and then that this side is alive."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT_SECONDS):
                with suppress(SnapchainError):
                    self.say(Kind.BEAT)

        thread = threading.Thread(target=beat, name="beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

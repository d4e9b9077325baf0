"""The sender's two threads at the channel: one writes what waits in a short queue, one reads what comes back.

So neither latency nor a slow disk at the other side stops the reading here, until a window of bytes is unconfirmed.
The first failure of either thread ends both, and is raised where the next frame is given.
"""

from __future__ import annotations

import queue
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from snapchain.errors import Corrupt, Unavailable
from snapchain.host.batches import Buffer
from snapchain.host.channel import Channel
from snapchain.objects.throttle import TokenBucket
from snapchain.replica.stream.frames import FRAME_BYTES, Frame, FrameWriter, Kind
from snapchain.replica.stream.messages import Done, Message, Stored, decode, encode
from snapchain.replica.stream.requests import REQUESTS
from snapchain.replica.stream.session import BEAT_SECONDS, ClientSession, describe

WINDOW = 256 << 20
"""Bytes that may be on their way or not yet durable: a second of 2 Gbit/s, 25 times what 80 ms of 1 Gbit/s hold."""
QUEUE = 4
"""Frames. What waits here is sent again after a crash, so on a slow link it should not be much."""
_COUNT = struct.Struct("<Q")
_GRACE = 2.0
"""Seconds in which the other side's last words may still arrive after it closed its ear."""

OnResponse = Callable[[Frame], bool]
_Item = tuple[Kind, tuple[Buffer, ...], Callable[[], None]]
"""A frame, and the callback for when it is on the wire."""


class SendQueue:
    """Frames put here are sent in order.

    frames: the writer, after HELLO and OPEN
    session: reads the responses; None where nobody responds
    """

    def __init__(
        self,
        channel: Channel,
        frames: FrameWriter,
        session: ClientSession | None = None,
        *,
        limit_rate: int | None = None,
    ) -> None:
        self._channel, self._frames, self._session = channel, frames, session
        self._bucket = None if limit_rate is None else TokenBucket(limit_rate)
        self._queue: queue.Queue[_Item | None] = queue.Queue(QUEUE)
        self._state = threading.Condition()
        self._failure: BaseException | None = None
        self._given = 0
        self._marks: list[int] = []  # bytes given up to each mark that is not yet confirmed
        self._mark_count = self._confirmed_count = self._confirmed = 0
        self._stored: list[Stored] = []
        self._expected: list[str] = []
        self._points = 0
        self._stopping = False
        self._done: Done | None = None
        self._requests: deque[tuple[Kind, OnResponse]] = deque()  # whose responses are still to come
        self._threads = [threading.Thread(target=self._write, name="send queue", daemon=True)]
        if session is not None:
            self._threads.append(threading.Thread(target=self._listen, name="responses", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def fullness(self) -> float:
        """Of the queue, from 0 to 1."""
        return self._queue.qsize() / QUEUE

    @property
    def confirmations(self) -> int:
        """How often the other side has confirmed that something is durable."""
        return self._confirmed_count + len(self._stored)

    def put(self, kind: Kind, *body: Buffer, on_sent: Callable[[], None] = lambda: None) -> int:
        """Give a frame; its bytes on the wire. Waits while the queue or the window is full. Raises what went wrong.

        on_sent: called in another thread when the frame is on the wire; what it raises ends the transfer
        """
        size = FRAME_BYTES + sum(len(part) for part in body)
        if self._session is not None:
            self._wait_for_window()
        if kind is Kind.POINT:
            with self._state:
                self._points += 1
        self._give((kind, body, on_sent))
        self._given += size
        return size

    def _give(self, item: _Item | None) -> None:
        """Put it into the queue, unless the thread that empties it has failed."""
        while True:
            self.check()
            try:
                self._queue.put(item, timeout=0.5)
            except queue.Full:
                continue
            return

    def mark(self, *body: Buffer) -> None:
        """Give a MARK frame, which will be confirmed."""
        with self._state:
            self._mark_count += 1
            self._marks.append(self._given)
        self.put(Kind.MARK, *body)

    def end_layer(self, layer: str, body: bytes) -> None:
        """Put an END frame; STORED will confirm it."""
        with self._state:
            self._expected.append(layer)
        self.put(Kind.END, body)

    def request(self, kind: Kind, message: Message, on_response: OnResponse) -> None:
        """Send a request that is answered within the stream.

        on_response: called in another thread with each frame of its response, until it returns True for the last one;
            what it raises ends the transfer
        """
        with self._state:
            self._requests.append((kind, on_response))
        self.put(kind, encode(message))

    def stop(self) -> Done | None:
        """Put STOP, and wait until the other side has everything; its DONE, or None where nobody responds."""
        with self._state:
            self._stopping = True
        self.put(Kind.STOP)
        if self._session is None:
            self.flush()
            return None
        self._give(None)
        with self._state:
            self._state.wait_for(lambda: self._done is not None or self._failure is not None)
        self.check()
        return self._done

    def flush(self) -> None:
        """Wait until everything is written; nothing may be given any more. Raises what went wrong."""
        self._give(None)
        self._threads[0].join()
        self.check()

    def fail(self, error: BaseException) -> None:
        """Tell the other side why nothing more comes, as far as it still listens."""
        with self._state:
            is_open = self._failure is None and self._done is None
            self._failure = self._failure or error
        if not is_open:
            return
        with suppress(queue.Full):
            self._queue.put((Kind.FAIL, (encode(describe(error)),), lambda: None), timeout=_GRACE)
            self._queue.put(None, timeout=_GRACE)
            self._threads[0].join(_GRACE)

    def check(self) -> None:
        """Raise what has gone wrong, if anything."""
        if self._failure is not None:
            raise self._failure

    def _wait_for_window(self) -> None:
        deadline = None
        with self._state:
            while self._failure is None and self._marks and self._given - self._confirmed > WINDOW:
                deadline = deadline or time.monotonic() + 4 * self._channel.patience
                if not self._state.wait(max(0.0, deadline - time.monotonic())):
                    raise Unavailable(
                        f"it has confirmed nothing for {4 * self._channel.patience:.0f} seconds",
                        subject=self._channel.peer,
                        hint="look at the disk of the other host",
                    )

    def _write(self) -> None:
        try:
            while True:
                try:
                    item = self._queue.get(timeout=BEAT_SECONDS)
                except queue.Empty:
                    self._frames.send(Kind.BEAT)
                    continue
                if item is None:
                    return
                kind, body, on_sent = item
                if self._bucket is not None:
                    self._bucket.take(FRAME_BYTES + sum(len(part) for part in body))
                self._frames.send(kind, *body)
                if self._bucket is not None:
                    self._bucket.take(0)  # wait until the frame fits the rate, before it counts as sent
                on_sent()
        except BaseException as error:  # noqa: BLE001 -- raised again where the next frame is given
            # A side that gave up has sent the reason before it closed: that is the better error.
            if self._session is not None:
                self._threads[1].join(_GRACE)
            self._fail(error)

    def _listen(self) -> None:
        assert self._session is not None
        try:
            while self._done is None:
                self._hear(self._session.next())
        except BaseException as error:  # noqa: BLE001 -- raised again where the next frame is given
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._state:
            if self._failure is None and self._done is None:
                self._failure = error
            self._state.notify_all()

    def _hear(self, frame: Frame) -> None:
        hear: dict[Kind, Callable[[Frame], None]] = {
            Kind.ACK: self._hear_ack,
            Kind.STORED: self._hear_stored,
            Kind.DONE: self._hear_done,
        }
        if frame.kind in hear:
            with self._state:
                hear[frame.kind](frame)
                self._state.notify_all()
            return
        kind, on_response = self._requests[0] if self._requests else (None, None)
        if kind is None or on_response is None or frame.kind not in REQUESTS[kind].responses:
            raise Corrupt(f"{frame.kind.name} has no place here in the stream", subject=self._channel.peer)
        if on_response(frame):  # without the lock: it may wait for the thread that sends
            with self._state:
                self._requests.popleft()

    def _hear_ack(self, frame: Frame) -> None:
        if len(frame.body) != _COUNT.size:
            raise Corrupt("a confirmation is cut off", subject=self._channel.peer)
        (count,) = _COUNT.unpack(frame.body)
        if not self._confirmed_count < count <= self._mark_count:
            raise Corrupt(
                f"mark {count} is confirmed, but {self._confirmed_count} of {self._mark_count} were before",
                subject=self._channel.peer,
            )
        for _ in range(count - self._confirmed_count):
            self._confirmed = self._marks.pop(0)
        self._confirmed_count = count

    def _hear_stored(self, frame: Frame) -> None:
        stored = decode(Stored, frame.body, subject=self._channel.peer)
        if not self._expected or self._expected[0] != stored.layer:
            raise Corrupt("it reports a layer as stored that was not sent", subject=self._channel.peer)
        self._expected.pop(0)
        self._stored.append(stored)

    def _hear_done(self, frame: Frame) -> None:
        if not self._stopping or self._expected or self._requests:
            raise Corrupt("the end is announced before everything was sent", subject=self._channel.peer)
        done = decode(Done, frame.body, subject=self._channel.peer)
        if len(done.points) != self._points:
            raise Corrupt(
                f"it has published {len(done.points)} points of the {self._points} that were sent",
                subject=self._channel.peer,
                hint="run it again: layers that are there are not sent twice",
            )
        self._done = done

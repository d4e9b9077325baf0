"""How a guest stood when a point of it was taken: the words are those of backup products."""

from __future__ import annotations

from enum import StrEnum


class Consistency(StrEnum):
    """What a restore of the point must expect.

    OFFLINE       nobody had the disk open: as good as after a shutdown
    APPLICATION   programs of the guest had brought their data into order (hooks of the guest agent, VSS writers)
    FILESYSTEM    the guest's filesystems were frozen: mounts without repair; databases recover
    CRASH         one instant of a running guest, as after a power cut: journals are replayed

    None in its place says that nobody knows, which is not the same as CRASH: a copy of a file that was written
    meanwhile is worse.
    """

    OFFLINE = "offline"
    APPLICATION = "application"
    FILESYSTEM = "filesystem"
    CRASH = "crash"

"""The disks of a running guest as sources: sealed by a live snapshot, and what is sealed is read as images at rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from snapchain.errors import Unsupported
from snapchain.guest import snapshot
from snapchain.guest.disks import active_path, find_disk
from snapchain.guest.protocol import Guest
from snapchain.guest.snapshot import Quiesce, SnapshotRequest
from snapchain.image import ImageChain
from snapchain.model.events import OnEvent, ignore
from snapchain.source.at_rest import ImageAtRest
from snapchain.source.protocol import Scope


class RunningDisk:
    """A Source: a disk of a running guest. Its image, the top of its chain, has another path after each snapshot.

    image_dirs: as `scan` takes them
    """

    def __init__(self, guest: Guest, name: str, *, image_dirs: Sequence[Path] = (), on_event: OnEvent = ignore) -> None:
        self._guest, self.name, self._image_dirs, self._on_event = guest, name, image_dirs, on_event

    @property
    def image(self) -> Path:
        """The active layer's path now. Raises NotFound for a disk that the guest no longer has."""
        return active_path(find_disk(self._guest, self.name), guest=self._guest)

    @property
    def image_format(self) -> str | None:
        """Of that layer."""
        return find_disk(self._guest, self.name).active.known_format

    @contextmanager
    def opened(self, scope: Scope = Scope.SEALED) -> Iterator[ImageChain]:
        """See `Source`: only what is sealed can be read while the guest runs. Raises Unsupported for anything else."""
        if scope is not Scope.SEALED:
            raise Unsupported(
                "the guest writes to the active layer of the disk, so only the layers below can be read",
                subject=f"{self._guest.name}/{self.name}",
                hint="take a snapshot first, or shut the guest down",
            )
        with self._at_rest().opened(Scope.SEALED) as chain:
            yield chain

    def seal(self) -> Path:
        """See `Sealer`. Not quiesced. Raises as `guest.snapshot`."""
        return RunningDisks([self], image_dirs=self._image_dirs, on_event=self._on_event).seal()[0]

    def check_unchanged(self, chain: ImageChain) -> None:
        """See `Source`."""
        self._at_rest().check_unchanged(chain)

    def check_not_given(self, chain: ImageChain) -> None:
        """See `Source`."""
        self._at_rest().check_not_given(chain)

    def epoch(self, chain: ImageChain) -> int:
        """See `Source`."""
        return self._at_rest().epoch(chain)

    def note_epoch(self, epoch: int) -> None:
        """See `Source`."""
        self._at_rest().note_epoch(epoch)

    @property
    def guest(self) -> Guest:
        """Whose disk it is."""
        return self._guest

    def _at_rest(self) -> ImageAtRest:
        return ImageAtRest(self.image, format=self.image_format, image_dirs=self._image_dirs, on_event=self._on_event)


class RunningDisks:
    """A SetSealer: disks of one running guest, sealed at one instant. Not quiesced: the rounds are for a migration."""

    def __init__(
        self, disks: Sequence[RunningDisk], *, image_dirs: Sequence[Path] = (), on_event: OnEvent = ignore
    ) -> None:
        self._disks, self._image_dirs, self._on_event = disks, image_dirs, on_event

    def seal(self) -> Sequence[Path]:
        """See `SetSealer`. Raises as `guest.snapshot.plan` and `run`: then none is sealed."""
        guest, names = self._disks[0].guest, [disk.name for disk in self._disks]
        request = SnapshotRequest(disks=names, quiesce=Quiesce.NO, image_dirs=self._image_dirs)
        made = snapshot.run(guest, snapshot.plan(guest, request), request, on_event=self._on_event)
        sealed = {each.disk: each.sealed for each in made.disks}
        return [sealed[name] for name in names]

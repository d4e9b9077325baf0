"""merge of a local chain, offline: one file of several neighbours, under the path of the uppermost.

The recipe, of stock tools: a new overlay on the uppermost input, moved down by `qemu-img rebase` (safe mode) to
the file below the inputs; with the root, `qemu-img convert`.  No input is written to.  The result must check
clean, record the right link and read exactly as before; only then, in this order, each step on the disk before
the next: journal, rename, removal of the inputs that nobody else needs.

Nobody can start a guest on any of the files meanwhile (QEMU's own locks); the inputs stay readable for qemu-img
until the switch, when they are taken for ourselves alone.  Killed at any moment: the image reads as before, and the
next run finishes or undoes by the journal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.errors import Conflict, Corrupt, SnapchainError, ToolFailed, Unavailable
from snapchain.host import files
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.openers import OpenFiles
from snapchain.image import ImageChain, qemu_img, scan
from snapchain.image.difference import doubtful_bytes, first_difference
from snapchain.image.qemu_img import Qcow2Options
from snapchain.ops.events import Notice, OnEvent, Progress, ignore
from snapchain.ops.merge_journal import TEMPORARY, FileId, MergeJournal, sweep, unsettled
from snapchain.ops.merge_plan import Asked, KeptFile, MergePlan, Strategy, decide, plan, search_directories

_JUDGE_ALWAYS = 256 << 20
"""qemu-img compare reads the files below the merge too: it judges as well where they cost little beside the merge."""


class MergeReport(BaseModel):
    """What `run` did. Sizes in bytes.

    bytes_moved: guest data in the result; bytes_freed: allocated by the inputs that went, less what the result
    allocates (below 0 when inputs were kept); removed, kept: the inputs; finished: results of earlier, killed merges
    """

    model_config = ConfigDict(frozen=True)

    image: Path
    result: Path
    strategy: Strategy
    layers_before: int
    layers_after: int
    bytes_moved: int
    bytes_freed: int
    removed: tuple[Path, ...]
    kept: tuple[KeptFile, ...]
    finished: tuple[Path, ...]


def run(planned: MergePlan, *, on_event: OnEvent = ignore) -> MergeReport:
    """Do it.

    Raises Busy when somebody has a file of the chain open, Conflict when it is no longer as planned, Unavailable when
    room would not suffice, Corrupt when the result is not the same as the inputs: then nothing was changed.
    """
    leftovers = _settle(planned, on_event)
    if planned.strategy is Strategy.NOTHING:
        return _report(planned, removed=leftovers)
    with _locks(planned, on_event) as inputs, _chain(planned) as old:
        sweep(planned.result)
        _check_room(planned)
        before = sum(_allocated(path) for path in [planned.result, *planned.remove])
        journal = MergeJournal(
            replaced=FileId.of(planned.result),
            temporary=files.temporary_beside(planned.result, purpose=TEMPORARY),
            kept_as=planned.kept_as,
            search=search_directories(old, planned.image_dirs),
        )
        journal.save()
        try:
            _make(planned, journal.temporary, on_event)
            moved = _prove(planned, old, journal.temporary, on_event)
            files.copy_standing(planned.result, journal.temporary)
            files.fsync_file(journal.temporary)
            open_files = OpenFiles()
            for lock in inputs:
                lock.change(LockMode.WRITE, open_files=open_files)
            _check_unchanged(old)
            journal = journal.model_copy(
                update={
                    "stage": "switching",
                    "result": FileId.of(journal.temporary),
                    "remove": tuple(FileId.of(path) for path in planned.remove),
                }
            )
            journal.save()
            if planned.kept_as is not None:
                files.link(planned.result, planned.kept_as)
            files.rename(journal.temporary, planned.result)
        except BaseException:
            if not journal.switched:
                with suppress(SnapchainError, OSError):
                    journal.settle()
            raise
    # The locks are let go first: settling takes its own, and the switch is done whatever comes now.
    removed = journal.settle()
    return _report(
        planned,
        moved=moved,
        freed=before - sum(_allocated(path) for path in [planned.result, *planned.remove]),
        removed=[*leftovers, *removed],
    )


def _settle(planned: MergePlan, on_event: OnEvent) -> list[Path]:
    """Finish or undo what killed merges have left in this chain."""
    removed: list[Path] = []
    for journal in unsettled(Path(os.path.realpath(path)) for path in planned.chain):
        done = "finished" if journal.switched else "undone"
        removed += journal.settle()
        on_event(Notice(f"{journal.replaced.path}: an interrupted merge was {done}"))
    return removed


@contextmanager
def _locks(planned: MergePlan, on_event: OnEvent) -> Iterator[list[ImageLock]]:
    """All files locked against writers, the inputs once found free of anybody; gives the inputs' locks."""
    with ExitStack() as stack:
        inputs: list[ImageLock] = []
        open_files = OpenFiles()
        for number, path in enumerate(planned.chain):
            is_input = planned.first <= number <= planned.last
            lock = stack.enter_context(
                ImageLock(path, LockMode.WRITE if is_input else LockMode.READ, open_files=open_files)
            )
            if is_input:
                lock.change(LockMode.READ)  # qemu-img must read it until the switch
                inputs.append(lock)
            if not lock.enforced:
                on_event(Notice(f"{path}: this filesystem has no locks; make sure that no guest uses it"))
        yield inputs


@contextmanager
def _chain(planned: MergePlan) -> Iterator[ImageChain]:
    """The chain, scanned under the locks and still as planned."""
    asked = Asked(
        planned.image,
        flatten=False,
        from_layer=str(planned.chain[planned.first]),
        to_layer=str(planned.chain[planned.last]),
        keep_inputs=planned.keep_inputs,
        drop_bitmaps=planned.drop_bitmaps,
        image_format=planned.image_format,
        image_dirs=planned.image_dirs,
    )
    # What room there is, and what killed merges had left, may be otherwise now.
    passing: dict[str, object] = {"free_bytes": 0, "unfinished": (), "kept_as": None}
    with scan(planned.image, format=planned.image_format, image_dirs=planned.image_dirs) as chain:
        if decide(chain, asked).model_copy(update=passing) != planned.model_copy(update=passing):
            raise Conflict("it was changed after the merge was planned", subject=planned.image, hint="run it again")
        yield chain


def _check_room(planned: MergePlan) -> None:
    room = files.free_bytes(planned.result.parent)
    if planned.needs_bytes > room:
        raise Unavailable(
            f"the merged file needs {planned.needs_bytes} bytes beside its inputs, and {room} are free",
            subject=planned.result.parent,
            hint=f"free {planned.needs_bytes - room} bytes more, or merge fewer layers at a time (--from, --to)",
        )


def _make(planned: MergePlan, temporary: Path, on_event: OnEvent) -> None:
    def on_fraction(fraction: float) -> None:
        on_event(Progress("merge", int(fraction * planned.bytes_to_move), planned.bytes_to_move))

    options = Qcow2Options(cluster_size=planned.cluster_size, extended_l2=planned.extended_l2 or None)
    upper = planned.chain[planned.last]
    on_fraction(0)
    os.close(files.open_new(temporary))
    try:
        if planned.backing is None:
            formats: tuple[qemu_img.Format, qemu_img.Format] = ("qcow2", "qcow2")
            qemu_img.convert(upper, temporary, formats=formats, options=options, on_progress=on_fraction)
        else:
            # In another directory the name may have to be another one: absolute holds in all.
            above = qemu_img.BackingLink(str(planned.result), "qcow2")
            qemu_img.create(temporary, planned.virtual_size, options=options, backing=above)
            qemu_img.rebase(temporary, planned.backing, on_progress=on_fraction)
    except ToolFailed as error:
        if "No space left" in error.stderr or "Disk quota" in error.stderr:
            raise Unavailable(
                "the filesystem is full; nothing was changed",
                subject=planned.result.parent,
                hint=f"the merged file needs up to {planned.needs_bytes} bytes",
            ) from error
        raise


def _prove(planned: MergePlan, old: ImageChain, temporary: Path, on_event: OnEvent) -> int:
    """The result must be sound, stand where it should, and read as before; the bytes of data that it holds."""
    if not qemu_img.check(temporary).clean:
        raise Corrupt("the merged file does not check clean; nothing was changed", subject=planned.result)
    below = planned.first
    with scan(temporary, format="qcow2", image_dirs=[file.real_path.parent for file in old.files]) as new:
        expected = [file.device for file in old.files[:below]]
        link = new.top.backing
        recorded = None if link is None else (link.name, link.format)
        wanted = None if planned.backing is None else (planned.backing.argument(), planned.backing.format)
        if [file.device for file in new.files[:-1]] != expected or recorded != wanted:
            raise Corrupt("the merged file records a wrong backing file; nothing was changed", subject=planned.result)
        view = old.at(planned.last)
        total = doubtful_bytes(view, new, shared=below)
        done = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            on_event(Progress("verify", done, total))

        on_event(Progress("verify", 0, total))
        at = first_difference(view, new, shared=below, on_bytes=on_bytes)
        moved = new.top.extents.data_bytes
        beside = old.resolve(upto=below - 1).data_bytes if below else 0
    if at is None and beside <= max(_JUDGE_ALWAYS, 2 * total):
        said = qemu_img.compare(planned.chain[planned.last], temporary, formats=("qcow2", "qcow2"))
        at = None if said is None else -1
    if at is not None:
        where = f"from byte {at} on" if at >= 0 else "as qemu-img sees it"
        raise Corrupt(f"the merged file reads differently {where}; nothing was changed", subject=planned.result)
    return moved


def _check_unchanged(old: ImageChain) -> None:
    changed = old.changed()
    if changed:
        raise Conflict("it was written to while it was merged; nothing was changed", subject=changed[0].path)


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _report(planned: MergePlan, *, removed: list[Path], moved: int = 0, freed: int = 0) -> MergeReport:
    kept = planned.keep
    if planned.kept_as is not None:
        kept = (KeptFile(path=planned.kept_as, reason=f"what {planned.result.name} was"), *kept)
    gone = set(removed)
    stayed = tuple(KeptFile(path=path, reason="needed since") for path in planned.remove if path not in gone)
    return MergeReport(
        image=planned.image,
        result=planned.result,
        strategy=planned.strategy,
        layers_before=planned.layers_before,
        layers_after=planned.layers_after,
        bytes_moved=moved,
        bytes_freed=freed,
        removed=tuple(removed),
        kept=(*kept, *stayed),
        finished=planned.unfinished,
    )


__all__ = ["MergePlan", "MergeReport", "Strategy", "plan", "run"]

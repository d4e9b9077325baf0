"""What a live merge has left when its QEMU is gone: by headers and bytes alone, as between images at rest.

    stream          done once the header of the uppermost input records the new link; else it only has more data
    commit          done once the file above records the lowest input; else the chain reads as before, through the
                    uppermost input, and the files between are invalid: the same range is merged again, at rest
    active commit   the guest may have been switched to the lowest input, and have written there since

Inputs go only after the result was compared with them, and where no header names them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from snapchain.errors import Conflict, Corrupt
from snapchain.host import files
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.openers import OpenFiles
from snapchain.host.terminal import shell_word
from snapchain.image import ImageChain, ImageFile, scan
from snapchain.image.backing import Place
from snapchain.image.opening import open_image
from snapchain.image.physical import RunBudget
from snapchain.image.qcow2.header import read_header
from snapchain.merge.journal import FileId, LiveMerge, MergeJournal, linked, look_at, sweep, taken
from snapchain.merge.prove import prove
from snapchain.merge.settle import Settled, opened_entry, remove_inputs
from snapchain.model.events import OnEvent, ignore
from snapchain.model.extents import ABSENT, pairwise
from snapchain.source.lineage import record_live


def is_done(journal: MergeJournal, live: LiveMerge) -> bool:
    """Whether the headers show the result. An active commit changes none: its record tells what was seen."""
    if live.kind == "stream":
        with opened_entry(journal.result) as fd:
            return linked(fd, journal.link, subject=journal.result.path)
    if live.kind == "active-commit":
        return live.pivot == "done"
    return live.above is not None and _names(live.above, journal.result)


def _names(above: FileId, below: FileId) -> bool:
    """Whether the header of a file records another file. False where another one has taken its name."""
    if not above.still():
        return False
    with opened_entry(above.whatever_written()) as fd:
        recorded = read_header(fd, subject=above.path).backing
    return recorded is not None and below.still(Path(os.path.realpath(above.path.parent / recorded.name)))


def must_be_done_again(journal: MergeJournal, live: LiveMerge) -> bool:
    """Whether the same range must be merged first: files between its ends are invalid by now."""
    return live.kind != "stream" and journal.result.still() and not is_done(journal, live)


def describe_live(journal: MergeJournal, live: LiveMerge) -> tuple[str, str]:
    """(what happened, what is done about it)."""
    names = ", ".join(entry.path.name for entry in journal.remove) or "nothing"
    began = f"a live merge ({live.kind}) of {live.guest}/{live.disk}"
    if not journal.result.still():
        return f"{began} whose result has another name now", "removes the journal"
    if is_done(journal, live):
        return f"{began} whose result is in place; its inputs are still there", f"compares them, and removes {names}"
    if live.kind == "stream":
        return f"{began} that was not finished; the image reads as before", "goes on with it, or removes the journal"
    ends = f"{live.inputs[0].path.name} and {live.inputs[-1].path.name}"
    return (
        f"{began} that was not finished; the image reads as before, the files between {ends} do not",
        "goes on with it, or merges the same files again",
    )


def settle_at_rest(journal: MergeJournal) -> Settled:
    """Finish or undo a live merge whose guest is off.

    Raises Busy while QEMU or the merge is at work, Conflict for one that must be done again (by `recover`) and for an
    active commit of which nobody can tell whether the guest was switched, Corrupt where the result reads differently.
    """
    live = journal.live
    assert live is not None
    with taken(journal):
        if not journal.result.still():
            files.remove(journal.path)
            return Settled([])
        with _locked(live):
            if must_be_done_again(journal, live):
                check_not_switched(journal, live)
                raise Conflict(
                    f"a live merge from {live.inputs[0].path.name} to this file was not finished, and comes first",
                    subject=live.inputs[-1].path,
                    hint=f"`snapchain doctor {shell_word(live.inputs[-1].path)}` finishes it",
                )
            if not is_done(journal, live):
                files.remove(journal.path)
                return Settled([])
            prove_again(journal, live, ignore)
            note(journal, live)
        settled = remove_inputs(journal)
        sweep(journal.replaced.path)
        return settled


@contextmanager
def _locked(live: LiveMerge) -> Iterator[None]:
    """Nobody has any of the files open. Raises Busy with the guest that may have them."""
    with ExitStack() as stack:
        open_files = OpenFiles()
        for entry in [*live.inputs, *([live.above] if live.above else [])]:
            if entry.still():
                stack.enter_context(ImageLock(entry.path, LockMode.WRITE, open_files=open_files))
        yield


def check_not_switched(journal: MergeJournal, live: LiveMerge) -> None:
    """Raises Conflict where a guest may have been switched to the lowest input, and has written there since.

    As long as both read the same, it does not matter by which of them it starts.
    """
    if live.kind != "active-commit" or live.pivot != "asked for":
        return
    with suppress(Corrupt):
        prove_again(journal, live, ignore)
        return
    lowest, active = live.inputs[0].path, live.inputs[-1].path
    raise Conflict(
        f"the guest may have been switched to {lowest.name} before it ended, and only its next start can tell",
        subject=active,
        hint=f"`snapchain merge {live.option}` while the guest runs settles it; if it was switched (its definition "
        f"names {lowest.name}), remove {active.name} and {journal.path.name}; else remove {journal.path.name} alone",
    )


@contextmanager
def inputs_of(live: LiveMerge, below: ImageChain | None, result: ImageFile | None = None) -> Iterator[ImageChain]:
    """The inputs above the files of `below`, opened as they are now, whatever links they record.

    result: stands for the input that it is; after a pivot the guest writes to it, so it is opened already or not at all
    Raises Conflict where another file has taken a name, NotFound where one is gone.
    """
    with ExitStack() as stack:
        found: list[ImageFile] = list(below.files) if below is not None else []
        for entry, image_format in zip(live.inputs, live.formats, strict=True):
            if result is not None and result.device == (entry.device, entry.inode):
                found.append(result)
                continue
            place = Place.of(entry.path)
            fd = open_image(place.real, subject=place.path, named_by=place.named_by)
            if not entry.is_at(look_at(fd)):
                os.close(fd)
                raise Conflict(
                    "another file has the name of this input",
                    subject=entry.path,
                    hint="move it away, then run it again",
                )
            opened_file = ImageFile(place, fd, format=image_format, budget=RunBudget())
            found.append(stack.enter_context(opened_file))
        yield ImageChain(found, owned=False)


def prove_again(journal: MergeJournal, live: LiveMerge, on_event: OnEvent) -> None:
    """Compare a result that is in place with its inputs, as far as they still tell. Raises Corrupt where it differs.

    Of a stream the uppermost input is not known as it was: shown is that nothing of the lower ones is missing.
    """
    if any(not entry.still() for entry in live.inputs):
        return  # they were compared before the first of them was removed
    result = journal.result.path
    image_format = live.formats[-1 if live.kind == "stream" else 0]
    directories = tuple(entry.path.parent for entry in live.inputs)
    with scan(result, format=image_format, image_dirs=(*journal.search, *directories)) as new:
        below = new.at(len(new.files) - 2) if len(new.files) > 1 else None
        with inputs_of(live, below) as old:
            if live.pivot == "done":
                check_covers(new, old)
                return
            prove(old, new, shared=len(new.files) - 1, subject=result, on_event=on_event)


def check_covers(view: ImageChain, inputs: ImageChain) -> None:
    """Raises Conflict where the lowest input lacks something that the ones above it hold.

    Its guest has written to it since: the bytes cannot be compared, but a range that was not copied shows.
    """
    lowest = len(view.files) - 1
    _, owner, own = pairwise(inputs.resolve(), view.top.extents)
    if bool(((owner > lowest) & (own == ABSENT)).any()):
        raise Conflict(
            "the result lacks data of the layers that were merged into it; all files stay",
            subject=view.top.path,
            hint="keep all of them, and report this",
        )


def note(journal: MergeJournal, live: LiveMerge) -> None:
    """Record what the result was made of. Raises as `record_live`."""
    if any(not entry.still() for entry in live.inputs):
        return  # recorded before the first of them was removed
    note_result(journal, live)


def note_result(journal: MergeJournal, live: LiveMerge) -> None:
    """Record what a result was made of, and when its view was sealed. Raises as `record_live`.

    The file above shows what it did, but a commit has written another link into its header.
    """
    view = None if live.time is None else (live.time, live.labels)
    record_live([entry.path for entry in live.inputs], live.sources, journal.result.path, view=view)
    was = live.above_sealed
    if was is not None and live.above is not None:
        record_live([live.above.path], [was.file], live.above.path, view=(was.time, was.labels))


def remove_record(journal: MergeJournal) -> None:
    """Of a merge that has changed nothing. Idempotent."""
    files.remove(journal.path)

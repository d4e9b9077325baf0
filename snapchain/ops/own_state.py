"""Small files in the user's state directory that are believed: this user alone can have written them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from snapchain.errors import Corrupt
from snapchain.host.directory import Directory
from snapchain.host.files import write_in
from snapchain.host.os_errors import os_errors
from snapchain.host.private import check_not_of_others, make_private

_REMEDY = "remove it: what it holds is found out again"
M = TypeVar("M", bound=BaseModel)


def read_own(path: Path, shape: type[M], *, largest: int) -> M:
    """Raises NotFound, and Corrupt for a file that somebody else may have written, that is larger, or is unsound.

    InvalidInput where root would read what somebody else can put there.
    """
    with os_errors(path), Directory.open(path.parent) as directory:
        check_not_of_others(directory, path.parent)
        fd = directory.open_file(path.name)
    with os_errors(path), os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise Corrupt("others may have written to this file", subject=path, hint=_REMEDY)
        text = file.read(largest + 1)
    if len(text) > largest:
        raise Corrupt(f"this file has more than {largest} bytes", subject=path, hint=_REMEDY)
    try:
        return shape.model_validate_json(text)
    except ValidationError as error:
        raise Corrupt("this file is unsound", subject=path, hint=_REMEDY) from error


def write_own(path: Path, record: BaseModel) -> None:
    """Replace it, and make its directory. Raises InvalidInput as `read_own`."""
    with os_errors(path):
        make_private(path.parent)
        with Directory.open(path.parent) as directory:
            check_not_of_others(directory, path.parent)
            write_in(directory, path.name, record.model_dump_json().encode())

"""Records in this user's state directory: JSON of one shape, in a file that host/private.py judges."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from snapchain.errors import Corrupt
from snapchain.host.private import PrivateDirectory

M = TypeVar("M", bound=BaseModel)


def read_record(path: Path, shape: type[M], *, cap: int) -> M:
    """cap: bytes that it may have.

    Raises NotFound where there is none, Corrupt for what is no such record, and as PrivateDirectory.
    """
    with PrivateDirectory(path.parent) as directory:
        text = directory.read(path.name, cap=cap)
    try:
        return shape.model_validate_json(text)
    except ValidationError as error:
        raise Corrupt(
            "this file is unsound", subject=path, hint="remove it: what it holds is found out again"
        ) from error


def write_record(path: Path, record: BaseModel) -> None:
    """Replace it, and make its directory."""
    with PrivateDirectory(path.parent, make=True) as directory:
        directory.write(path.name, record.model_dump_json().encode())

"""Disk images at rest: what a chain of files holds, read by our own bounded parser.

`scan(path)` gives an ImageChain of ImageFiles, root first; each has a map (`extents`, `physical`) and reads bytes.
"""

from __future__ import annotations

from snapchain.image.chain import ImageChain
from snapchain.image.file import ImageFile
from snapchain.image.physical import Physical
from snapchain.image.qcow2.header import Backing, Qcow2Header
from snapchain.image.scan import scan

__all__ = ["Backing", "ImageChain", "ImageFile", "Physical", "Qcow2Header", "scan"]

"""Names of disks by a template: "{parent}/{stem}" of /images/web1/vda.qcow2 is web1/vda."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from snapchain.model.disk_name import check_disk_name

_FIELD = re.compile(r"\{([^{}]*)\}")
_FIELDS = ("stem", "name", "parent", "host")


def check_template(template: str) -> str:
    """Raises ValueError for a template with unknown fields."""
    # Not str.format: its fields may look into objects.
    for field in _FIELD.findall(template):
        if field not in _FIELDS:
            known = ", ".join(f"{{{each}}}" for each in _FIELDS)
            raise ValueError(f'"{{{field}}}" is no field of a name: known are {known}')
    if set("{}") & set(_FIELD.sub("", template)):
        raise ValueError(f'"{template}" has a brace without its other half')
    return template


def disk_name(template: str, image: Path) -> str:
    """The name that the template gives an image. Raises InvalidInput when no disk can be named so."""
    values = {"stem": image.stem, "name": image.name, "parent": image.parent.name, "host": socket.gethostname()}
    return check_disk_name(_FIELD.sub(lambda match: values[match[1]], template))

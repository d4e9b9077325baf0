"""A destination, whatever kind it is: points of disks go there, can be listed, proven, given back, and let go.

    destination = open_destination("ssh://kvm2/srv/replica")
    with destination.reader("web1/vda", "nightly") as point:
        ...

A repository and a replica implement it in their own packages; `destinations.open_destination` is the one door. In what
kinds rightly differ `traits` tells; testing/destination_contract.py holds what every kind must do.
"""

from __future__ import annotations

from typing import Protocol

from snapchain.destination.reading import ReadableDestination
from snapchain.destination.writing import Writing


class Destination(ReadableDestination, Writing, Protocol):
    """Points of disks, at one place."""

"""A descriptor of any number can be waited for."""

from __future__ import annotations

import fcntl
import os
import resource

from snapchain.host.readable import is_readable


def test_a_descriptor_from_1024_on() -> None:
    """select(2) refuses it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    reader, writer = os.pipe()
    try:
        high = fcntl.fcntl(reader, fcntl.F_DUPFD_CLOEXEC, 2000)
        assert not is_readable(high, 0)
        os.write(writer, b"x")
        assert is_readable(high, None)
        os.close(high)
    finally:
        os.close(reader)
        os.close(writer)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

"""The S3 servers, one of each a worker."""

import pytest

from tests.objects.conftest import moto, moto_server, rclone, rclone_server

# Failing asserts of the shipped contract suite shall show their values, as those of the tests do.
pytest.register_assert_rewrite("snapchain.testing.destination_contract", "snapchain.testing.destination_faults")

__all__ = ["moto", "moto_server", "rclone", "rclone_server"]

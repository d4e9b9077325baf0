"""The S3 servers, one of each a worker."""

from tests.objects.conftest import moto, moto_server, rclone, rclone_server

__all__ = ["moto", "moto_server", "rclone", "rclone_server"]

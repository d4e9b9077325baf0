"""An NBD server: points of disks as read-only block devices. The protocol is that of the NBD project's doc/proto.md."""

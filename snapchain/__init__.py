"""snapchain: ship, merge and restore the snapshot chains of QEMU disks."""

"""Migrate: hand a disk over to the host of a replica, all disks of a guest or none."""

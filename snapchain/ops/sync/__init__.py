"""Sync: keep a replica close behind a disk, in rounds of sealing and shipping."""

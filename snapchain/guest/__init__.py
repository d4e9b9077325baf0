"""A running guest: one protocol; QEMU's monitor and libvirt; the guest agent, snapshots, block jobs."""

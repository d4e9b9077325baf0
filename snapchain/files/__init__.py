"""Files of a guest: its partitions, volumes and file systems, read by a child process without rights."""

"""Restore: a point becomes a file, a chain of files, or the content of a device."""

"""Epochs: the number that says which host may write a disk."""

LARGEST_EPOCH = 1 << 31
"""An epoch is a number from 1 to this one."""

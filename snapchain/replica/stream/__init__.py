"""The wire between a sender and a replica, as docs/stream.md has it: frames, and what stands in them."""

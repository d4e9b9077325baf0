"""A destination that is a real qcow2 chain in a directory, ready to run: here, or on another host.

stream/     the wire: frames, messages, maps, data (docs/stream.md)
sending     sender, outbox, source: reads an image, writes a stream
receiving   receiver, arrival: reads a stream, judges every word of it, writes qcow2 files
asking      asking, answering, checking: what points there are, and whether they are sound
merging     merging, layer_merge, merge_journal: layers that no kept point needs are merged into the next
store       store, catalogue, names: what a replica is on disk
"""

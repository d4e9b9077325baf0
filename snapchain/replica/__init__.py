"""A destination that is a real qcow2 chain in a directory, ready to run: here, or on another host.

stream/      the wire: the table of requests and their messages, frames, layers, sessions (docs/stream.md)
sending      sender, outgoing, send_queue: read an image, write a stream
receiving    receiver, arrival: read a stream, check all of it, write qcow2 files
requests     client asks; status, fetch_server, holds, handover, merging answer; permissions decide
merging      merging, layer_merge, merge_journal: layers that no kept point needs become one
on disk      store, catalogue, names, access, epochs
"""

"""What is sealed and shipped: a chain of image files at rest, who may write it, and what is noted beside it."""

NOTE_PREFIX = ".snapchain-layer-"
"""How the name of a note begins (notes.py). A directory without such a file needs nothing that reads notes."""

"""mount: the points of a destination as files."""

"""files: single files of a point, or of an image: listed, shown, got, and followed through all points of a disk."""

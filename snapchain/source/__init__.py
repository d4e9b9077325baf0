"""What is sealed and shipped: a chain of image files at rest, who may write it, and what is noted beside it."""

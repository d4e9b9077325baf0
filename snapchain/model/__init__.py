"""Pure values and functions: extents, layers, chains, and every decision made about them. No I/O."""

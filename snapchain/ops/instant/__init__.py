"""Restores that can be used at once: an overlay on a point that is served, filled while it is used."""

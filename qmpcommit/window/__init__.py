"""Snapshot windows: an overlay laid for a while, and committed away."""

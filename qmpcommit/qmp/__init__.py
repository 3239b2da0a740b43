"""Speaks QMP; knows nothing of commits."""

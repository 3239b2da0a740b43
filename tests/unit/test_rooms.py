"""Rooms of the package: each imports only from the floors below it, and no two from each other."""

from __future__ import annotations

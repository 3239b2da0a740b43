"""A fresh overlay, made like the one whose place it takes."""

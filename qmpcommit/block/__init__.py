"""The disk as QEMU sees it."""

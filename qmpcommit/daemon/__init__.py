"""The daemon: one process a host, many VMs, and promises that survive it."""

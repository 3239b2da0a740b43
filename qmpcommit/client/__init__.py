"""The daemon's client: a host with many VMs, and commits that survive whoever asked for them."""

DEFAULT_SOCKET = "/run/qmpcommit/qmpcommitd.sock"
"""Where the daemon listens, where nothing else is said."""

"""The daemon's client: a host with many VMs, and commits that survive whoever asked for them."""

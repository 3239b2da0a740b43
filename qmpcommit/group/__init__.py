"""Many disks, of one VM or of several, committed at one instant."""

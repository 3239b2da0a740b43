"""What a death has left on VMs: a look-up that changes nothing, and the way back."""

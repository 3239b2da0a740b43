"""Whatever may arrive, in quantity."""

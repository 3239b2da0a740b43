"""A guest that is held still: its run state, its frozen file systems, the marks that tell."""

"""Random operations on a real storage daemon, beside a plain model of what its images contain."""

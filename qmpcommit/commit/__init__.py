"""The two-phase commit.

The package shares its name with the one-line call, ``await qmpcommit.commit(...)``: `qmpcommit`
shows that function, whose attributes are this package's.
"""

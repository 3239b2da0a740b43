"""The command, whose process is killed by SIGKILL at its n-th place.

Arguments: the place's number (0: never), the file to which the places are written as they are
passed, and the command's own.
"""

from __future__ import annotations

import sys

from qmpcommit.cli.main import main
from tests.ground.killing import places

if __name__ == "__main__":
    _, DIE_AT, PLACES, *WORDS = sys.argv
    places(PLACES, int(DIE_AT))
    sys.argv = ["qmpcommit", *WORDS]
    main()

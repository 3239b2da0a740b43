"""The two-phase commit.

The package shares its name with the one-line call, ``await qmpcommit.commit(...)``. Importing
any module in here makes Python set ``qmpcommit.commit`` to this package, so the package itself
can be called, and the call works in whatever order things are imported.
"""

import sys
from collections.abc import Awaitable
from types import ModuleType
from typing import Any


class _Commit(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Awaitable[Any]:
        from qmpcommit.commit.vm import commit

        return commit(*args, **options)


sys.modules[__name__].__class__ = _Commit

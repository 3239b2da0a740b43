"""Former names of options: taken for one more version, each with a `DeprecationWarning`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast
from warnings import warn

F = TypeVar("F", bound=Callable[..., Any])


def former(**names: str) -> Callable[[F], F]:
    """Have a function take options by the names that they had, as in ``former(agent="agents")``.

    Of two that are given for one idea the call is refused, with a TypeError.
    """

    def known(function: F) -> F:
        @wraps(function)
        def called(*given: Any, **options: Any) -> Any:
            for old, new in names.items():
                if old not in options:
                    continue
                if new in options:
                    raise TypeError(f"{function.__name__}() got both {new} and {old}, its old name")
                now = f"{old}= of {function.__name__}() is {new}= now"
                warn(f"{now}, and goes with the next version", DeprecationWarning, stacklevel=2)
                options[new] = options.pop(old)
            return function(*given, **options)

        return cast("F", called)

    return known

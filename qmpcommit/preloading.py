"""All of the library loaded at once, for hosts that want no import in their event loop."""

from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

_LATE = ("structlog", "concurrent.futures.thread", "encodings.ascii", "encodings.idna")
"""What Python itself and the library load at their first use."""

_PROGRAMS = ("__main__", "cli", "daemon")


def preload() -> None:
    """Load all of the library now, so that nothing is imported while an event loop runs.

    For a host that minds the milliseconds which the first use of a name takes otherwise. The
    daemon and the command are left out, and the daemon's client where h11 is not installed.
    """
    for name in _LATE:
        import_module(name)
    for found in walk_packages([str(Path(__file__).parent)], "qmpcommit."):
        if found.name.split(".")[1] not in _PROGRAMS:
            try:
                import_module(found.name)
            except ModuleNotFoundError as missing:
                if missing.name != "h11":
                    raise

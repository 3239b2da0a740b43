"""The events that QEMU emits around disks, jobs and guests, for ``from qmpcommit import events``.

A model for each, `AnyEvent` for all that have one, `parse_event` for what a program reads from a
monitor itself, and `EventStream`, which ``vm.events()`` gives. A field of a pydantic model that is
typed `Event` takes any of them, and travels as the QMP message that the event came as.
"""

from qmpcommit.qmp import events
from qmpcommit.qmp.events import *  # noqa: F403
from qmpcommit.qmp.subscriptions import EventStream

__all__ = ["EventStream", *events.__all__]  # noqa: PLE0604

"""Who comes in, and who is cut for that."""

from __future__ import annotations

from qmpcommit.daemon.connections import Door


class Guest:
    def __init__(self, door: Door, *, idle: bool = True) -> None:
        self.door, self.idle, self.is_cut = door, idle, False

    def cut(self) -> None:
        self.is_cut = True
        self.door.leave(self)


def test_the_oldest_that_asks_for_nothing_makes_room() -> None:
    door = Door(3, 3)
    busy, old, young, late = (Guest(door, idle=idle) for idle in (False, True, True, True))
    assert all(door.enter(each, 1) for each in (busy, old, young, late))
    assert [each.is_cut for each in (busy, old, young, late)] == [False, True, False, False]


def test_where_all_are_busy_nobody_more_comes_in() -> None:
    door = Door(2, 2)
    first = Guest(door, idle=False)
    assert door.enter(first, 1)
    assert door.enter(Guest(door, idle=False), 2)
    assert not door.enter(Guest(door), 3)
    door.leave(first)
    door.leave(first)
    assert door.enter(Guest(door), 3)


def test_a_user_takes_no_other_ones_room() -> None:
    door = Door(4, 2)
    other = Guest(door)
    assert door.enter(other, 2)
    mine = [Guest(door) for _ in range(5)]
    assert all(door.enter(each, 1) for each in mine)
    assert [each.is_cut for each in mine] == [True, True, True, False, False]
    assert not other.is_cut
    for each in mine:
        each.idle = False
    assert not door.enter(Guest(door), 1)
    assert door.enter(Guest(door), 3)

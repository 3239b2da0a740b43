"""Tests that forget something, each one another thing; `test_net.py` has all of them fail."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any


async def test_forgets_nothing() -> None:
    await asyncio.sleep(0)


async def test_never_awaited() -> None:
    asyncio.sleep(0)  # type: ignore[unused-coroutine]


async def test_unclosed_socket() -> None:
    socket.socket()


def test_unclosed_socket_without_a_loop() -> None:
    socket.socket()


def test_unclosed_loop() -> None:
    asyncio.new_event_loop()


async def test_unclosed_stream() -> None:
    one, other = socket.socketpair()
    with other:
        await asyncio.open_connection(sock=one)


async def test_unclosed_file() -> None:
    open("/dev/null")  # noqa: SIM115


async def test_socket_left_open() -> None:
    kept.append(socket.socket())


async def test_task_left_behind() -> None:
    kept.append(asyncio.create_task(asyncio.sleep(100)))


async def test_task_destroyed_while_pending() -> None:
    async def waits() -> None:
        await asyncio.get_running_loop().create_future()

    loop = asyncio.new_event_loop()
    task = loop.create_task(waits())
    loop.call_soon(loop.stop)
    await asyncio.to_thread(loop.run_forever)
    loop.close()
    del task, loop


async def test_exception_never_retrieved() -> None:
    async def fails() -> None:
        raise ZeroDivisionError

    task = asyncio.create_task(fails())
    await asyncio.sleep(0)
    del task


async def test_exception_never_retrieved_in_a_cycle() -> None:
    future: Any = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda _: future)
    future.set_exception(ZeroDivisionError())


def test_exception_never_retrieved_in_a_loop_of_its_own() -> None:
    async def forgets() -> None:
        asyncio.get_running_loop().create_future().set_exception(ZeroDivisionError())

    asyncio.run(forgets())


async def test_callback_that_raises() -> None:
    asyncio.get_running_loop().call_soon(lambda: 1 / 0)


async def test_thread_that_raises() -> None:
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()


async def test_raises_where_nobody_hears() -> None:
    class Raises:
        def __del__(self) -> None:
            raise ZeroDivisionError

    Raises()


async def test_process_left_behind() -> None:
    kept.append(await asyncio.create_subprocess_exec("sleep", "1"))


kept: list[Any] = []

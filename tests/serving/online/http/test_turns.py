"""Work of many connections takes turns: in order, a little in each, and none is lost."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from functools import partial

from advmoe_deploy.serving.online.turns import Flow, Inbox, Turns


def test_callers_go_on_in_order_and_a_few_in_each_turn() -> None:
    went: list[tuple[int, int]] = []

    async def run() -> None:
        turns, now = Turns(3), [0]

        async def caller(number: int) -> None:
            await turns.take()
            went.append((now[0], number))

        tasks = [asyncio.create_task(caller(number)) for number in range(11)]
        tasks[5].cancel()
        while not all(task.done() for task in tasks):
            now[0] += 1
            await asyncio.sleep(0)
        await turns.take()

    asyncio.run(run())
    assert [number for _, number in went] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    per_turn = [sum(turn == each for turn, _ in went) for each in {turn for turn, _ in went}]
    assert max(per_turn) <= 3


def test_what_raises_in_its_turn_does_not_end_the_turns_of_others() -> None:
    async def run() -> list[int]:
        went: list[int] = []
        asyncio.get_running_loop().set_exception_handler(lambda *_: went.append(-1))
        turns = Turns(1)
        for number in range(4):
            turns.call([lambda: went.append(0), lambda: 1 / 0][number % 2])
        for _ in range(9):
            await asyncio.sleep(0)
        return went

    assert asyncio.run(run()) == [0, -1, 0, -1]


def test_connections_read_a_few_pieces_in_each_turn() -> None:
    went: list[int] = []

    async def run() -> None:
        turns, now = Turns(2), 0

        class Reader(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                assert isinstance(transport, asyncio.Transport)
                self.flow = Flow(transport, turns)

            def data_received(self, data: bytes) -> None:
                went.append(now)
                self.flow.pause_reading()
                self.flow.resume_reading()

        with contextlib.ExitStack() as stack:
            theirs = []
            for _ in range(9):
                ours, other = socket.socketpair()
                loop = asyncio.get_running_loop()
                transport, _ = await loop.create_connection(Reader, sock=ours)
                stack.callback(transport.close)
                stack.enter_context(other)
                theirs.append(other)
            while len(went) < 40:
                now += 1
                for other in theirs:
                    other.send(b"more")
                await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(run())
    steady = went[20:]  # at first there is nothing to read for those that may
    assert max(steady.count(turn) for turn in steady) <= 2


Ends = list[tuple["Looking", socket.socket]]
Turn = Callable[[], Awaitable[None]]


class Looking(asyncio.Protocol):
    """Notes what came, and in which turn of the loop it was looked at; "!" is urgent."""

    def __init__(self, turns: Turns, now: list[int]) -> None:
        self._turns, self._now = turns, now
        self.looked: list[tuple[int, bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.inbox = Inbox(self._turns, Flow(transport, Turns()))

    def data_received(self, data: bytes) -> None:
        self.inbox.put(data, self.look, is_urgent=data.startswith(b"!"))

    def look(self, data: bytes) -> None:
        self.looked.append((self._now[0], data))


def with_looking(
    turns: Turns, connections: int, test: Callable[[Ends, Turn], Awaitable[None]]
) -> None:
    """Run ``test`` on both ends of so many connections, with what lets a turn of the loop pass."""

    async def run() -> None:
        now, ends = [0], Ends()

        async def turn() -> None:
            now[0] += 1
            await asyncio.sleep(0)

        with contextlib.ExitStack() as stack:
            for _ in range(connections):
                ours, other = socket.socketpair()
                loop = asyncio.get_running_loop()
                transport, own = await loop.create_connection(
                    partial(Looking, turns, now), sock=ours
                )
                stack.callback(transport.close)
                stack.enter_context(other)
                ends.append((own, other))
            await test(ends, turn)
        await asyncio.sleep(0)

    asyncio.run(run())


def test_a_few_of_many_connections_are_looked_at_in_each_turn_and_the_urgent_at_once() -> None:
    async def test(ends: Ends, turn: Turn) -> None:
        for _, other in ends[:-1]:
            other.send(b"request")
        ends[-1][1].send(b"!health")
        while not all(own.looked for own, _ in ends):
            await turn()
        went = [own.looked[0][0] for own, _ in ends]
        assert max(went[:-1].count(each) for each in went) == 2
        assert went[-1] == min(went)
        assert went[:-1] == sorted(went[:-1])

    with_looking(Turns(2), 12, test)


def test_pieces_of_a_connection_stay_in_order_and_two_of_them_wait_at_most() -> None:
    turns = Turns(1)

    async def test(ends: Ends, turn: Turn) -> None:
        ((own, other),) = ends
        for _ in range(30):
            turns.call(lambda: None)
        for piece in (b"a", b"!b", b"c", b"d"):
            other.send(piece)
            await turn()
            await turn()
        assert not own.looked
        assert own.inbox.has_more
        assert not own.transport.is_reading()
        while b"".join(data for _, data in own.looked) != b"a!bcd":
            await turn()
        assert own.transport.is_reading()
        assert not own.inbox.has_more

    with_looking(turns, 1, test)


def test_what_lies_in_the_socket_is_no_less_to_come() -> None:
    async def test(ends: Ends, turn: Turn) -> None:
        ((own, other),) = ends
        own.transport.pause_reading()
        other.send(b"more")
        assert own.inbox.has_more
        own.transport.resume_reading()
        while not own.looked:
            await turn()
        assert not own.inbox.has_more

    with_looking(Turns(), 1, test)


def test_a_pause_holds_though_the_turn_to_read_on_before_it_comes_later() -> None:
    turns, reads = Turns(), Turns(1)

    async def test(ends: Ends, turn: Turn) -> None:
        ((own, _),) = ends
        flow = Flow(own.transport, reads)
        reads.call(lambda: None)
        flow.pause_reading()
        flow.resume_reading()
        flow.pause_reading()
        await turn()
        await turn()
        assert not own.transport.is_reading()
        flow.resume_reading()
        assert own.transport.is_reading()

    with_looking(turns, 1, test)


def test_no_third_piece_waits_though_whoever_reads_a_body_reads_on() -> None:
    turns = Turns(1)

    async def test(ends: Ends, turn: Turn) -> None:
        ((own, other),) = ends
        for _ in range(30):
            turns.call(lambda: None)
        for _ in range(3):
            other.send(b"piece")
            await turn()
            await turn()
            own.inbox._flow.pause_reading()
            own.inbox._flow.resume_reading()
        assert not own.transport.is_reading()
        while b"".join(data for _, data in own.looked) != 3 * b"piece":
            await turn()

    with_looking(turns, 1, test)

"""Limits of the server: what one request may ask for, and what all of them may hold together."""

from dataclasses import dataclass

from advmoe_deploy.errors import UsageError

# What a request is charged until it is read, times the length of its body: the body itself and its
# images, which are as long again, or twice that of JSON, whose shortest number has two bytes, and
# once more while they are put into their order.
COPIES_OF_BINARY = 2
COPIES_OF_JSON = 4
# What an image file is charged for each of its pixels while it is decoded: four bytes of them as
# they are in the file, and as many in the colours of the model.
BYTES_OF_PIXEL = 8
# Connections that wait to be accepted.
BACKLOG = 2048


_MOST = 2**31 - 1
_DAY_S = 86_400.0


@dataclass(frozen=True)
class Limits:
    """Sizes in images and bytes, times in seconds.

    Attributes:
        max_images: in one request.
        max_body: bytes of one request's body.
        batch: images that are computed together, of one request or of many.
        delay_s: how long the first of them waits at most for others that are on their way.
        queue: images that wait; what comes on top is answered with 503.
        memory: bytes of all bodies that are being read, and of all images that wait.
        timeout_s: how long a request may wait for its computation to begin.
        connections: open at once; what comes on top is answered with 503.
        keep_alive_s: until a connection without a request is closed. Proxies keep theirs for 60
            and lose a request if the server is the first to close.
        head_s: until the head of a request has to be there.
        body_s: until its body has to be there, and until an answer has to be read.
        drain_s: after SIGTERM in which the server is not ready, and still takes requests.
        window: images that the route monitor judges together; 0 judges none.
    """

    max_images: int = 1024
    max_body: int = 64 << 20
    batch: int = 64
    delay_s: float = 0.002
    queue: int = 4096
    memory: int = 512 << 20
    timeout_s: float = 30.0
    connections: int = 8192  # more than can wait, else what is refused comes on new ones
    keep_alive_s: float = 75.0
    head_s: float = 10.0
    body_s: float = 30.0
    drain_s: float = 1.0
    window: int = 512

    @property
    def max_pixels(self) -> int:
        """Pixels of one image file: half of the memory is for it, at most."""
        return self.memory // (2 * BYTES_OF_PIXEL)

    def __post_init__(self) -> None:
        counts = (self.max_images, self.batch, self.queue, self.connections)
        if min(counts) < 1 or max(counts) > _MOST:
            raise UsageError(
                f"a limit of images or connections is not from 1 to {_MOST}; change it"
            )
        if not min(self.timeout_s, self.head_s, self.body_s) > 0:
            raise UsageError(
                "a limit of time is 0, which nothing keeps; raise --timeout or --body-timeout"
            )
        times = (self.delay_s, self.timeout_s, self.keep_alive_s, self.head_s, self.body_s)
        if not all(0 <= seconds <= _DAY_S for seconds in (*times, self.drain_s)):
            raise UsageError(
                "a limit of time is not from 0 to a day; change --delay-ms, --timeout, "
                "--keep-alive, --body-timeout or --drain"
            )
        if self.queue < self.max_images:
            raise UsageError(
                f"a queue of {self.queue} images has no room for one request of "
                f"{self.max_images}; raise --queue"
            )
        if self.memory < (needed := COPIES_OF_JSON * self.max_body):
            raise UsageError(
                f"{self.memory >> 20} MiB have no room for one request, which may need "
                f"{needed >> 20}; raise --memory"
            )


class Budget:
    """Bytes that all requests hold together, for one thread."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._limit = limit

    @property
    def used(self) -> int:
        """The bytes that are held."""
        return self._limit - self._left

    def hold(self) -> "Hold":
        """Return an empty share, to be used as a context manager."""
        return Hold(self)

    def _take(self, count: int) -> bool:
        if count > self._left:
            return False
        self._left -= count
        return True


class Hold:
    """The share of one request; it is given back at the end of the block."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.bytes = 0
        self._over = False

    def grow(self, count: int) -> bool:
        """Raise the share to ``count`` bytes if there are as many; it never shrinks.

        Raises:
            RuntimeError: the block has ended, so nobody would give them back.
        """
        if self._over:
            raise RuntimeError("the request has ended, and its share was given back")
        more = max(0, count - self.bytes)
        if not self._budget._take(more):  # noqa: SLF001, RUF100 - two halves of one thing
            return False
        self.bytes += more
        return True

    def shrink(self, count: int) -> None:
        """Lower the share to ``count`` bytes; it never grows."""
        less = max(0, self.bytes - count)
        self._budget._take(-less)  # noqa: SLF001, RUF100
        self.bytes -= less

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self.shrink(0)

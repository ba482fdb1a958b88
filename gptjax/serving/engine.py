"""Continuous batching: requests share the rows of one decoder. A request joins at the next call of
the decoder, and a row is free as soon as its text has ended or is no longer wanted.

It knows tokens, not text, and nothing of HTTP. One thread drives it (`run`, or `step` by step);
other threads may call `submit`, `Stream.cancel` and `close`.
"""

import collections
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.errors import RunError, UserError
from gptjax.sampling import CHUNK, Sampling
from gptjax.serving.decoder import Decoder, Ranks, Rows

INTERVAL = 0.03
"""Seconds between two pieces of a stream: as many tokens are drawn at a time as fit."""


class Full(RunError):
    """There is no room in the queue now."""


class Closed(RunError):
    """The engine serves no more."""


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What to draw, as `sampling.generate` does."""

    prompt: np.ndarray
    """int32 [P], P >= 1. Of a prompt longer than the block the last block_size tokens count."""
    max_new_tokens: int
    """0: the prompt is only read."""
    sampling: Sampling = Sampling()  # noqa: RUF009
    seed: int = 0
    sample: int = 0
    """Which of the samples of this seed."""
    exact: bool = False
    """Past the block: `overflow` "exact", not "half"."""
    ranked: bool = False
    """Whether to report how likely the tokens were."""
    prompt_ranked: bool = False
    """The same for the prompt's tokens."""
    look: bool = False
    """Whether to report the attention of the prompt's last token."""


class Piece(NamedTuple):
    """What a stream has got since the last one."""

    ids: np.ndarray
    """int32 [n]."""
    ranks: Ranks | None
    """[n] each, for a request that is `ranked`."""
    last: bool
    """Whether there are as many tokens now as were asked for."""
    closed: bool = False
    """Whether the engine has closed: nothing more will come."""


class Stream:
    """A request in progress, and what is known of its prompt."""

    def __init__(self, request: Request, listener: "Listener"):
        """`listener` is called in the engine's thread, and says whether to go on. It must not
        raise."""
        self.request = request
        self.prompt_ranks: Ranks | None = None
        """[P] each, of a request that is `prompt_ranked`; NaN where the model sees nothing before
        the token: at the first one, and at those of a long prompt that do not count."""
        self.attention: np.ndarray | None = None
        """float32 [L, H, T], of the prompt's last token over the T that it sees, its own last."""
        self._listener = listener
        self._text = request.prompt.astype(np.int32).tolist()
        self._start = 0
        """Where in the text its window begins."""
        self._cached = 0
        """Tokens of the window that are in the row's cache."""
        self._cancelled = False
        self._number = 0
        """Of those that got a row, in order."""

    @property
    def is_new(self) -> bool:
        """Whether nothing has been drawn yet."""
        return len(self._text) == len(self.request.prompt)

    def cancel(self) -> None:
        """It is no longer wanted."""
        self._cancelled = True


Listener = Callable[[Stream, Piece], bool]


def window_start(position: int, prompt: int, block_size: int) -> int:
    """Where the window begins in which the token at `position` of a text sees those before it; the
    text's first `prompt` tokens were given. When the block is full, its older half is dropped."""
    first = max(0, prompt - block_size)
    beyond = position - first - block_size
    if beyond < 0:
        return first
    dropped = block_size + 1 - max(1, block_size // 2)
    return first + (beyond // dropped + 1) * dropped


class Engine:
    """See the module."""

    def __init__(self, decoder: Decoder, queue: int = 64):
        """`queue`: how many requests may wait for a row."""
        self.decoder, self._queue = decoder, queue
        self._rows: list[Stream | None] = [None] * decoder.rows
        self._waiting: collections.deque[Stream] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._seconds = INTERVAL / 4  # that drawing one token took lately
        self._admitted = itertools.count()
        self._new_first = False

    @property
    def busy(self) -> int:
        """Requests that have a row, or wait for one."""
        return sum(stream is not None for stream in self._rows) + len(self._waiting)

    def submit(self, streams: Sequence[Stream]) -> None:
        """Take all of them, or raise Full, Closed, or UserError: there are more than ever fit."""
        with self._changed:
            if self._closed:
                raise Closed("the server is shutting down")
            if len(streams) > (most := self._queue + len(self._rows)):
                raise UserError(f"{len(streams)} completions at once; this server takes {most}")
            room = most - sum(not s._cancelled for s in (*self._rows, *self._waiting) if s)
            if len(streams) > room:
                raise Full(f"{len(streams)} completions, with room for {room}; try again soon")
            self._waiting.extend(streams)
            self._changed.notify()

    def run(self) -> None:
        """Serve until `close`. Streams that are unfinished at the end, for whatever reason, get a
        last piece that says so."""
        try:
            while not self._closed:
                if not self.step():
                    with self._changed:
                        self._changed.wait_for(lambda: self._waiting or self._closed)
        finally:
            with self._changed:
                self._closed = True
                left = [stream for stream in (*self._rows, *self._waiting) if stream]
                self._rows = [None] * len(self._rows)
                self._waiting.clear()
            for stream in left:
                stream._listener(stream, Piece(np.zeros(0, np.int32), None, False, closed=True))

    def close(self) -> None:
        """Let `run` return."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def step(self) -> bool:
        """Admit, read for a while, draw for a while. Whether there was anything to do."""
        self._admit()
        if not any(self._rows):
            return False
        self._read()
        self._draw()
        return True

    def _admit(self) -> None:
        with self._changed:
            self._rows = [None if s is None or s._cancelled else s for s in self._rows]
            wanted = (stream for stream in self._waiting if not stream._cancelled)
            self._waiting = collections.deque(wanted)
            for row, stream in enumerate(self._rows):
                if stream is None and self._waiting:
                    self._rows[row] = new = self._waiting.popleft()
                    new._number = next(self._admitted)

    def _unread(self, stream: Stream) -> int:
        """How many tokens must still be read before the next one is drawn: the window's, but for
        the last one of the text, which is fed then."""
        last = len(stream._text) - 1
        block = self.decoder.config.block_size
        start = window_start(last, len(stream.request.prompt), block)
        if stream.request.exact:
            start = max(0, last + 1 - block)
        if start != stream._start:
            stream._start, stream._cached = start, 0
        return last - start - stream._cached

    def _read(self) -> None:
        """At least one piece, and as many as fit INTERVAL; first for those that drew before, then
        by age. Where not all fits, the new ones are first the next time."""
        began, new_first = time.monotonic(), self._new_first
        streams = [(row, stream) for row, stream in enumerate(self._rows) if stream]
        for row, stream in sorted(
            streams, key=lambda each: (each[1].is_new != new_first, each[1]._number)
        ):
            while self._unread(stream):
                self._read_piece(row, stream)
                if time.monotonic() - began > INTERVAL:
                    self._new_first = not new_first
                    return
            if not stream.request.max_new_tokens:
                if stream.request.look:
                    token = stream._text[-1]
                    stream.attention = self.decoder.look(row, token, stream._cached)
                self._deliver(row, Piece(np.zeros(0, np.int32), None, True))
        self._new_first = False

    def _read_piece(self, row: int, stream: Stream) -> None:
        length, ranked = len(stream.request.prompt), stream.request.prompt_ranked and stream.is_new
        tokens = np.array(stream._text[stream._start :], np.int32)
        stream._cached, at, ranks = self.decoder.read(row, tokens, stream._cached, ranked)
        if ranked:
            if stream.prompt_ranks is None:
                stream.prompt_ranks = Ranks(*(_unknown(x, length) for x in ranks))
            first = stream._start + at + 1
            for known, new in zip(stream.prompt_ranks, ranks, strict=True):
                known[first : first + len(new)] = new[: length - first]

    def _draw(self) -> None:
        """One call of the decoder."""
        block = self.decoder.config.block_size
        rows = Rows.resting(len(self._rows))
        most = int(np.clip(INTERVAL / self._seconds, 1, CHUNK))
        ranked, seen = False, None
        for row, stream in enumerate(self._rows):
            if stream is None:
                continue
            unread = self._unread(stream)
            # Also of a row that rests: what is written there must lie beyond what has been read.
            rows.length[row] = stream._cached
            if unread:
                continue
            text, request = stream._text, stream.request
            left = len(request.prompt) + request.max_new_tokens - len(text)
            rows.steps[row] = min(most, left, block - stream._cached)
            rows.token[row] = text[-1]
            rows.position[row] = len(text)
            rows.seed[row], rows.sample[row] = request.seed, request.sample
            settings: Any = rows.sampling
            for of_all, own in zip(settings, request.sampling, strict=True):
                of_all[row] = own
            ranked = ranked or request.ranked
            if request.sampling.repetition_penalty != 1:
                if seen is None:
                    seen = np.zeros((len(self._rows), self.decoder.config.vocab_size or 0), bool)
                seen[row, text] = True
        if not rows.steps.any():
            return
        began = time.monotonic()
        tokens, ranks = self.decoder.decode(rows, ranked, seen)
        took = (time.monotonic() - began) / rows.steps.max()
        self._seconds += (took - self._seconds) / 4
        for row in map(int, np.flatnonzero(rows.steps)):
            stream, count = self._rows[row], int(rows.steps[row])
            assert stream
            new = tokens[:count, row]
            stream._text += new.tolist()
            stream._cached += count
            own_ranks = Ranks(*(x[:count, row] for x in ranks)) if stream.request.ranked else None
            drawn = len(stream._text) - len(stream.request.prompt)
            self._deliver(row, Piece(new, own_ranks, drawn == stream.request.max_new_tokens))

    def _deliver(self, row: int, piece: Piece) -> None:
        stream = self._rows[row]
        assert stream
        goes_on = not stream._cancelled and stream._listener(stream, piece)
        if piece.last or not goes_on:
            self._rows[row] = None


def _unknown(like: np.ndarray, length: int) -> np.ndarray:
    """[length, ...]: NaN, or 0 where there is none."""
    return np.full((length, *like.shape[1:]), np.nan if like.dtype == np.float32 else 0, like.dtype)

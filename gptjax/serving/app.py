"""HTTP: OpenAI's completions, the attention of a token, and the page. (The extra `serve`.)

A server on one's own machine is open to every page that one's browser shows. So a request must name
this server, not another name that has been made to point here (DNS rebinding), and it must not come
from another site's page.

What takes long, such as encoding a long prompt, is done in threads: the event loop has to keep all
streams going.
"""

import asyncio
import base64
import contextlib
import hashlib
import importlib.resources
import ipaddress
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import h11
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptjax.errors import UserError
from gptjax.run import Run
from gptjax.serving import completions, engine
from gptjax.serving.completions import CLOSED, Answer, Choice, Limits
from gptjax.serving.engine import Closed, Engine, Full, Piece, Stream

ENDING = 2.0
"""Seconds that the server's thread is given to end."""

PATIENCE = 10.0
"""Seconds between two looks at a connection; it is closed if nothing has moved."""

HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
]
"""Of every answer."""


class Refused(Exception):
    """A request that is answered with OpenAI's error object."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status, self.kind = status, kind

    @property
    def error(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": None, "code": None}}

    def response(self) -> Response:
        headers = {"retry-after": "1"} if self.status in (429, 503) else {}
        return _json(self.error, self.status, headers)


class Server:
    """Answers requests, for one run and the engine that has its weights."""

    def __init__(self, run: Run, name: str, engine: Engine, limits: Limits = Limits()):
        """`name`: what clients call the model."""
        self._run, self._name, self._engine, self._limits = run, name, engine, limits

    def app(self, hosts: Collection[str] = ()) -> "Guard":
        """`hosts`: names of this server besides localhost and addresses."""
        file = importlib.resources.files("gptjax.serving").joinpath("playground.html")
        page = file.read_text(encoding="utf-8")
        headers = {"content-security-policy": content_policy(page)}

        async def playground(_: Request) -> Response:
            return Response(page, media_type="text/html", headers=headers)

        async def health(_: Request) -> Response:
            return _json({"status": "ok", "requests": self._engine.busy})

        def posted(answer: Callable[[Request, Any], Any]) -> Callable[[Request], Any]:
            async def respond(request: Request) -> Response:
                try:
                    return await answer(request, await self._body(request))
                except Refused as refused:
                    return refused.response()
                except Full as error:
                    return Refused(429, str(error), "rate_limit_error").response()
                except Closed as error:
                    return Refused(503, str(error), "server_error").response()
                except UserError as error:
                    return Refused(400, str(error)).response()

            return respond

        async def missing(request: Request, error: Any) -> Response:
            what = f"{request.method} {request.url.path}: {error.detail}"
            return Refused(error.status_code, what).response()

        routes = [
            Route("/", playground),
            Route("/health", health),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._models),
            Route("/v1/completions", posted(self._complete), methods=["POST"]),
            Route("/api/attention", posted(self._attention), methods=["POST"]),
        ]
        app = Starlette(routes=routes, exception_handlers={404: missing, 405: missing})
        return Guard(app, hosts)

    async def _models(self, request: Request) -> Response:
        """What clients ask for, and what the page needs to know."""
        config, run = self._run.config, self._run
        model = {
            "id": self._name, "object": "model", "created": 0, "owned_by": "gptjax",
            "step": run.step, "parameters": config.num_parameters(), "n_layer": config.n_layer,
            "n_head": config.n_head, "block_size": config.block_size,
            "vocab_size": run.tokenizer.n_vocab, "tokenizer": run.tokenizer.kind,
            "max_tokens": self._limits.max_tokens,
        }  # fmt: skip
        name = request.path_params.get("name")
        if name is None:
            return _json({"object": "list", "data": [model]})
        return _json(model) if name == self._name else self._unknown(name).response()

    def _unknown(self, model: str) -> Refused:
        return Refused(404, f"no model {model!r}; this server has {self._name!r}")

    async def _body(self, request: Request) -> Any:
        """JSON. A form of another site cannot send this type."""
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise Refused(415, "expected a body of type application/json")
        body, most = bytearray(), self._limits.body_bytes
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise Refused(413, f"the body is longer than {most} bytes")
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not JSON") from None

    async def _complete(self, request: Request, body: Any) -> Response:
        tokenizer = self._run.tokenizer
        order = await asyncio.to_thread(completions.parse, body, tokenizer, self._limits)
        if (model := order.options.model) not in (None, self._name):
            raise self._unknown(str(model))
        inbox = _Inbox()
        choices = [
            Choice(p * order.options.n + i, prompt, order, tokenizer, inbox.send)
            for p, prompt in enumerate(order.prompts)
            for i in range(order.options.n)
        ]
        streams = [choice.stream() for choice in choices]
        self._engine.submit(streams)
        answer = Answer(self._name, order, tokenizer)
        if not order.options.stream:
            updates = await _collect(request, inbox, streams)
            return await asyncio.to_thread(lambda: _json(answer.whole(choices, updates)))

        def event(update: dict[str, Any]) -> str:
            return _event(answer.chunk(update))

        async def events() -> AsyncIterator[str]:
            try:
                async for update in _updates(inbox, streams):
                    long = "prompt_ranks" in update
                    yield await asyncio.to_thread(event, update) if long else event(update)
            except Refused as refused:
                yield _event(refused.error)
                return
            if order.include_usage:
                yield _event(answer.usage(choices))
            yield "data: [DONE]\n\n"

        return _Events(events(), streams)

    async def _attention(self, request: Request, body: Any) -> Response:
        """{"start": ..., "tokens": [...], "attention": [L][H][T]}."""
        tokenizer = self._run.tokenizer
        ids, start = await asyncio.to_thread(
            completions.attention_of, body, tokenizer, self._run.config
        )
        inbox = _Inbox()

        def listen(stream: Stream, piece: Piece) -> bool:
            inbox.send({"finish_reason": CLOSED if piece.closed else "stop"})
            return False

        stream = Stream(engine.Request(ids, 0, look=True), listen)
        self._engine.submit([stream])
        await _collect(request, inbox, [stream])
        assert stream.attention is not None
        weights = stream.attention

        def answer() -> Response:
            attention = np.round(weights.astype(float), 4).tolist()
            tokens = [completions.spell(tokenizer, id_) for id_ in ids.tolist()]
            return _json({"start": start, "tokens": tokens, "attention": attention})

        return await asyncio.to_thread(answer)


class _Inbox:
    """From the engine's thread to the event loop in which it was made. It is not bounded: of a
    client that does not read, it holds what is drawn until the connection is closed."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def send(self, update: dict[str, Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody reads any more
            self._loop.call_soon_threadsafe(self.queue.put_nowait, update)


class _Events(StreamingResponse):
    """Server-sent events. When they end, or the client disconnects, the streams end too."""

    def __init__(self, events: AsyncIterator[str], streams: Sequence[Stream]):
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._streams = streams

    async def __call__(self, *asgi: Any) -> None:
        try:
            await super().__call__(*asgi)
        finally:
            _cancel(self._streams)


def _cancel(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.cancel()


async def _updates(inbox: _Inbox, streams: Sequence[Stream]) -> AsyncIterator[dict[str, Any]]:
    """The updates of the streams, until all have finished."""
    left = len(streams)
    while left:
        update = await inbox.queue.get()
        if update["finish_reason"] == CLOSED:
            raise Refused(503, "the server is shutting down", "server_error")
        left -= update["finish_reason"] is not None
        yield update


async def _collect(
    request: Request, inbox: _Inbox, streams: Sequence[Stream]
) -> list[dict[str, Any]]:
    """All updates of the streams. If the client disconnects before, they end, and ClientDisconnect
    is raised."""

    async def collected() -> list[dict[str, Any]]:
        return [update async for update in _updates(inbox, streams)]

    async def disconnected() -> Any:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        raise ClientDisconnect

    tasks = [asyncio.create_task(collected()), asyncio.create_task(disconnected())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        _cancel(streams)
        for task in tasks:
            task.cancel()


class _Connection(H11Protocol):
    """uvicorn's, which would wait for ever for a request, and for a client that does not read. Here
    one is closed whose request has not arrived, or that took nothing of its answer, for between one
    and two times PATIENCE."""

    _seen: Any = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch = self.loop.call_later(PATIENCE, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(exc)

    def _check(self) -> None:
        self._watch = self.loop.call_later(PATIENCE, self._check)
        unsent = self.transport.get_write_buffer_size()
        incomplete = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        seen = (self.cycle, unsent) if incomplete or unsent else None
        if seen and seen == self._seen:
            self.transport.abort()
        self._seen = seen


class Guard:
    """ASGI: lets requests through that are meant for this server and do not come from another
    site's page; and adds HEADERS."""

    def __init__(self, app: Any, hosts: Collection[str]):
        self._app = app
        self._hosts = {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return

        async def send_safely(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        if reason := self._reason(Headers(scope=scope)):
            await Refused(403, reason).response()(scope, receive, send_safely)
            return
        with contextlib.suppress(ClientDisconnect):  # there is nobody to answer
            await self._app(scope, receive, send_safely)

    def _reason(self, headers: Headers) -> str | None:
        """Why the request is refused; None: it is not."""
        host = headers.get("host", "")
        if not self._is_ours(re.sub(r":\d*$", "", host)):
            return f"this server is not called {host!r}; names are added with --allowed-hosts"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return f"pages of {origin} may not use this server"
        return None

    def _is_ours(self, host: str) -> bool:
        """Addresses are: no name server can make another site's page be called by one."""
        if host.lower() in self._hosts:
            return True
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
        return False


def content_policy(page: str) -> str:
    """The page may run its own script and use its own style, and talk to this server only."""

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in parts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')};"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    )


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, allow_nan=False)}\n\n"


def _json(value: Any, status: int = 200, headers: Mapping[str, str] = {}) -> Response:
    """In ASCII: lone surrogates have no other form."""
    body = json.dumps(value, allow_nan=False)
    return Response(body, status, {"cache-control": "no-store", **headers}, "application/json")


def listen(host: str, port: int) -> socket.socket:
    """A bound socket: before slow work is done in vain. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        hint = "; choose another --port, or 0 for a free one" if port else ""
        raise UserError(f"cannot listen on {host}, port {port}: {reason}{hint}") from None


@contextlib.contextmanager
def serving(app: Any, bound: socket.socket) -> Iterator[None]:
    """Answers requests within, in its own thread."""
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", ws="none", server_header=False,
        limit_concurrency=256, http=_Connection, h11_max_incomplete_event_size=1 << 16,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = server.force_exit = True
        thread.join(ENDING)
        bound.close()

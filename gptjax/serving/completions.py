"""OpenAI's completions: a client's request, checked, and the answer to it, as JSON values."""

import dataclasses
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gptjax import config_io
from gptjax.config import ModelConfig
from gptjax.data.tokenizers import Gpt2Tokenizer, SentencePieceTokenizer, Tokenizer
from gptjax.errors import ConfigError, UserError
from gptjax.generation import GrowingText, prompt_ids
from gptjax.generation_config import GenerationConfig
from gptjax.sampling import Sampling
from gptjax.serving.decoder import ALTERNATIVES, Ranks
from gptjax.serving.engine import Piece, Request, Stream, window_start
from gptjax.settings import INT_LIMIT, Config

CLOSED = "closed"
"""The finish_reason of a text that is cut off because the server shuts down."""


@dataclasses.dataclass(frozen=True)
class Limits(Config):
    """How much one request may ask for."""

    max_tokens: int = 4096
    prompt_tokens: int = 65536
    """Of all prompts together, times `n`."""
    choices: int = 32
    """`n` times the number of prompts."""
    body_bytes: int = 1 << 20
    stop_characters: int = 256


@dataclasses.dataclass(frozen=True)
class Options(Config):
    """A body's fields without `prompt`. Their names and defaults are OpenAI's; from `top_k` on they
    are vLLM's."""

    model: str | None = None
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    stop: str | tuple[str, ...] = ()
    seed: int | None = None
    """Choice i of n is drawn with seed + i. None: a random one."""
    logprobs: int | None = None
    echo: bool = False
    stream: bool = False
    user: str | None = None
    best_of: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    suffix: str | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    return_token_ids: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    def problems(self) -> list[str]:
        out = self._check_ints(0, "max_tokens", "logprobs") + self._check_ints(1, "n")
        try:
            GenerationConfig(**Sampling.of(self)._asdict(), seed=self.seed or 0, stop=self.stops)
        except ConfigError as error:
            out += error.problems
        if (self.logprobs or 0) > ALTERNATIVES:
            out.append(f"logprobs {self.logprobs} is more than {ALTERNATIVES}")
        if self.best_of not in (None, self.n):
            out.append("best_of is not supported")
        for name in ("frequency_penalty", "presence_penalty", "suffix"):
            if getattr(self, name):
                out.append(f"{name} is not supported")
        return out


@dataclasses.dataclass(frozen=True)
class Prompt:
    """As the client wrote it, or decoded; and its tokens."""

    text: str
    ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class Order:
    """A request for completions, checked."""

    options: Options
    prompts: list[Prompt]
    seed: int
    include_usage: bool = False
    """Whether a stream ends with the numbers of tokens."""


def parse(body: Any, tokenizer: Tokenizer, limits: Limits) -> Order:
    """Takes long for long prompts. Raises UserError."""
    if not isinstance(body, dict):
        raise UserError("expected a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    prompt = given.pop("prompt", None)
    stream_options, bias = given.pop("stream_options", {}), given.pop("logit_bias", {})
    fields = [field.name for field in dataclasses.fields(Options)]
    _check_names(given, [*fields, "prompt", "stream_options", "logit_bias"])
    if bias:
        raise UserError("logit_bias is not supported")
    if not isinstance(stream_options, dict) or (stream_options and not given.get("stream")):
        raise UserError("stream_options must be an object, and needs stream: true")
    _check_names(stream_options, ["include_usage"])
    options = Options(**given)
    if len(options.stops) > 4:
        raise UserError(f"{len(options.stops)} stop texts; at most 4 are supported")
    if (longest := max(map(len, options.stops), default=0)) > limits.stop_characters:
        most = limits.stop_characters
        raise UserError(f"a stop text of {longest} characters; at most {most} are supported")
    if options.max_tokens > limits.max_tokens:
        raise UserError(f"max_tokens {options.max_tokens} is more than {limits.max_tokens}")
    prompts = list(_prompts(prompt, tokenizer))
    if len(prompts) * options.n > limits.choices:
        count = f"{len(prompts) * options.n} completions ({len(prompts)} prompts, n {options.n})"
        raise UserError(f"{count}; at most {limits.choices}")
    seed = secrets.randbelow(INT_LIMIT) if options.seed is None else options.seed
    usage = bool(stream_options.get("include_usage"))
    if (total := sum(len(prompt.ids) for prompt in prompts)) * options.n > limits.prompt_tokens:
        count = f"{total * options.n} tokens of prompts ({total}, n {options.n})"
        raise UserError(f"{count}; at most {limits.prompt_tokens}")
    return Order(options, prompts, seed, usage)


def _check_names(given: dict[str, Any], names: list[str]) -> None:
    """Raises UserError."""
    for name in given:
        if name not in names:
            raise UserError(f"unknown parameter {name!r}{config_io.near_miss(name, names)}")


def _prompts(given: Any, tokenizer: Tokenizer) -> Iterator[Prompt]:
    """Raises UserError."""
    several = isinstance(given, list) and given and all(isinstance(x, (str, list)) for x in given)
    for prompt in given if several else [given]:
        if prompt is None or isinstance(prompt, str):
            ids = prompt_ids(tokenizer, prompt)
            text = tokenizer.decode(ids.tolist()) if prompt is None else prompt
        else:
            ids = check_ids(prompt, tokenizer.n_vocab)
            text = tokenizer.decode(ids.tolist())
        yield Prompt(text, ids)


def check_ids(given: Any, n_vocab: int) -> np.ndarray:
    """int32 [n], n >= 1. Raises UserError."""
    if not isinstance(given, list) or not given or not all(type(x) is int for x in given):
        raise UserError("a prompt is a text, or a list of token ids; or a list of these")
    if wrong := [x for x in given if not 0 <= x < n_vocab]:
        raise UserError(f"token id {wrong[0]} is not one of the model's 0 to {n_vocab - 1}")
    return np.array(given, np.int32)


def attention_of(body: Any, tokenizer: Tokenizer, config: ModelConfig) -> tuple[np.ndarray, int]:
    """A request for one token's attention: (the tokens that it sees, itself last; where in the text
    they begin). Raises UserError."""
    names = {"text", "tokens", "position", "prompt_tokens"}
    if not isinstance(body, dict) or body.keys() - names:
        raise UserError("expected a JSON object with text or tokens, and position, prompt_tokens")
    if not config.n_layer:
        raise UserError("this model has no attention")
    if isinstance(body.get("text"), str) == ("tokens" in body):
        raise UserError("expected either a text or a list of tokens")
    text = body.get("tokens", body.get("text"))
    ids = prompt_ids(tokenizer, text) if isinstance(text, str) else None
    ids = check_ids(text, tokenizer.n_vocab) if ids is None else ids
    position = body.get("position", len(ids) - 1)
    prompt = body.get("prompt_tokens", len(ids))
    if type(position) is not int or not 0 <= position < len(ids):
        raise UserError(f"position must be one of 0 to {len(ids) - 1}, the tokens of the text")
    if type(prompt) is not int or not 1 <= prompt <= len(ids):
        raise UserError(f"prompt_tokens must be one of 1 to {len(ids)}")
    start = window_start(position, prompt, config.block_size)
    if start > position:  # of a long prompt, which does not count
        start = max(0, position + 1 - config.block_size)
    return ids[start : position + 1], start


class Choice:
    """One of a request's texts as it grows: the listener of its stream.

    With `logprobs` a token is reported once all of its text is: `text_offset` is where it begins in
    the choice's text, and two tokens that make one character together begin at the same place.
    """

    def __init__(
        self, index: int, prompt: Prompt, order: Order, tokenizer: Tokenizer,
        send: Callable[[dict[str, Any]], None],
    ):  # fmt: skip
        """`send` gets each update, in the engine's thread; the last one has a `finish_reason`."""
        self.drawn = 0
        """Tokens, up to the end of the text."""
        self._index, self._prompt, self._options = index, prompt, order.options
        self._seed = (order.seed + index % order.options.n) % INT_LIMIT
        self._tokenizer, self._send = tokenizer, send
        self._eot = None if order.options.ignore_eos else tokenizer.eot
        self._growing = GrowingText(tokenizer, order.options.stops, self._eot)
        self._pending: list[tuple[int, int, dict[str, Any]]] = []
        """Where the text of each unreported token begins and ends, and what to report."""
        self._started = False
        self._sent = 0
        """Characters."""

    def stream(self) -> Stream:
        """For the engine."""
        options, ranked = self._options, self._options.logprobs is not None
        sampling = Sampling.of(options)
        if options.top_k >= self._tokenizer.n_vocab:  # all of them are no filter
            sampling = sampling._replace(top_k=0)
        request = Request(
            self._prompt.ids,
            options.max_tokens,
            sampling,
            self._seed,
            ranked=ranked,
            prompt_ranked=ranked and options.echo,
        )
        return Stream(request, self)

    def __call__(self, stream: Stream, piece: Piece) -> bool:
        options = self._options
        before = len(self._prompt.text) if options.echo else 0
        text = "" if self._started or not options.echo else self._prompt.text
        reason = None
        ids = self._extend(piece, before)
        if self._growing.ended:
            reason = "stop"
        elif piece.last or piece.closed:
            reason, self._growing.ended = CLOSED if piece.closed else "length", True
        text += self._growing.take()
        self._sent += len(text)
        logprobs = None if options.logprobs is None else self._reportable(reason is not None)
        update = {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
        if options.return_token_ids:
            update["token_ids"] = ids
            update["prompt_token_ids"] = None if self._started else self._prompt.ids.tolist()
        if text or reason or options.return_token_ids or (logprobs and logprobs["tokens"]):
            if not self._started and stream.request.prompt_ranked:
                update["prompt_ranks"] = stream.prompt_ranks  # for `Answer.complete`
            self._started = True
            self._send(update)
        return reason is None

    def _extend(self, piece: Piece, before: int) -> list[int]:
        """Add its tokens, until the text ends; those that count."""
        if self._options.logprobs is None and not self._options.stops:
            self._growing.extend(piece.ids)
            ids = piece.ids.tolist()
            count = ids.index(self._eot) + 1 if self._growing.ended else len(ids)
            self.drawn += count
            return ids[:count]
        taken = []
        for i, id_ in enumerate(piece.ids.tolist()):
            start = before + self._growing.whole
            self._growing.extend(piece.ids[i : i + 1])
            taken.append(id_)
            if piece.ranks and id_ != self._eot:
                end = before + self._growing.whole
                ranks = Ranks(*(x[i] for x in piece.ranks))
                entry = _entry(self._tokenizer, id_, start, ranks, self._options.logprobs)
                self._pending.append((start, end, entry))
            if self._growing.ended:
                break
        self.drawn += len(taken)
        return taken

    def _reportable(self, at_end: bool) -> dict[str, list[Any]]:
        """The pending tokens whose text has been sent; at the end also the last one, of which a
        stop text may have left only the beginning."""
        ready = []
        for start, end, entry in self._pending:
            if not (end <= self._sent or (at_end and start < self._sent)):
                break
            ready.append(entry)
        self._pending = self._pending[len(ready) :]
        return _columns(ready)


def _entry(
    tokenizer: Tokenizer, id_: int, start: int, ranks: Ranks | None, alternatives: int | None
) -> dict[str, Any]:
    """What `logprobs` says of a token; `ranks`: its own, None: it has no probability."""
    own = spell(tokenizer, id_)
    logprob: float | None = None
    top: dict[str, float] | None = None
    if ranks:
        logprob, top = round(float(ranks.logprobs), 6), {}
        best = zip(ranks.top_ids.tolist(), ranks.top_logprobs.tolist(), strict=True)
        for other, x in [*best][:alternatives]:
            # Of tokens that are spelled alike, the likeliest.
            top.setdefault(spell(tokenizer, other), round(x, 6))
        top.setdefault(own, logprob)
    return {"tokens": own, "token_logprobs": logprob, "top_logprobs": top, "text_offset": start}


def _columns(entries: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    names = "tokens", "token_logprobs", "top_logprobs", "text_offset"
    return {name: [entry[name] for entry in entries] for name in names}


def _prompt_logprobs(
    tokenizer: Tokenizer, prompt: Prompt, ranks: Ranks | None, alternatives: int | None
) -> dict[str, list[Any]]:
    entries, start, unfinished = [], 0, list[int]()
    for i, id_ in enumerate(prompt.ids.tolist()):
        known = ranks is not None and not np.isnan(ranks.logprobs[i])
        own = Ranks(*(x[i] for x in ranks)) if ranks and known else None
        # The token that stands for an empty prompt is none of its text.
        at = min(start, len(prompt.text))
        entries.append(_entry(tokenizer, id_, at, own, alternatives))
        unfinished.append(id_)
        text = tokenizer.decode(unfinished)
        # A character has at most four bytes: more are none.
        if not text.endswith("\ufffd") or len(unfinished) > 8:
            start, unfinished = start + len(text), []
    return _columns(entries)


def spell(tokenizer: Tokenizer, id_: int) -> str:
    """A token by itself, for people: its text, or its bytes where they are not whole characters."""
    text = tokenizer.decode([id_])
    if text and "\ufffd" not in text:
        return text
    if isinstance(tokenizer, Gpt2Tokenizer) and id_ < len(tokenizer.pieces):
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.pieces[id_])
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.piece(id_)
    return text


class Answer:
    """What is sent to the client for one request."""

    def __init__(self, model: str, order: Order, tokenizer: Tokenizer):
        self._order, self._tokenizer = order, tokenizer
        self._prompt_logprobs: dict[int, dict[str, list[Any]]] = {}
        """Of the prompts that are known already."""
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def complete(self, update: dict[str, Any]) -> dict[str, Any]:
        """The update with the logprobs of its prompt, where it has to have them. That takes long
        for a long prompt, so it is not done where updates are made."""
        if "prompt_ranks" not in update:
            return update
        options, number = self._order.options, update["index"] // self._order.options.n
        ranks = update.pop("prompt_ranks")
        if number not in self._prompt_logprobs:
            self._prompt_logprobs[number] = _prompt_logprobs(
                self._tokenizer, self._order.prompts[number], ranks, options.logprobs
            )
        own = update["logprobs"]
        joined = {name: x + own[name] for name, x in self._prompt_logprobs[number].items()}
        return update | {"logprobs": joined}

    def chunk(self, update: dict[str, Any]) -> dict[str, Any]:
        """One event of a stream."""
        usage = {"usage": None} if self._order.include_usage else {}
        return self._head | {"choices": [self.complete(update)]} | usage

    def usage(self, choices: list[Choice]) -> dict[str, Any]:
        """The last event of a stream."""
        read = sum(len(prompt.ids) for prompt in self._order.prompts)
        drawn = sum(choice.drawn for choice in choices)
        counts = {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}
        return self._head | {"choices": [], "usage": counts}

    def whole(self, choices: list[Choice], updates: list[dict[str, Any]]) -> dict[str, Any]:
        """Not streamed: all updates put together."""
        by_choice: list[list[dict[str, Any]]] = [[] for _ in choices]
        for update in updates:
            by_choice[update["index"]].append(self.complete(update))
        return self.usage(choices) | {"choices": [joined(own) for own in by_choice]}


def joined(updates: list[dict[str, Any]]) -> dict[str, Any]:
    """The updates of one choice."""
    out = updates[-1] | {"text": "".join(update["text"] for update in updates)}
    if out["logprobs"]:
        out["logprobs"] = {
            name: [x for update in updates for x in update["logprobs"][name]]
            for name in out["logprobs"]
        }
    if "token_ids" in out:
        out["token_ids"] = [id_ for update in updates for id_ in update["token_ids"]]
        out["prompt_token_ids"] = updates[0]["prompt_token_ids"]
    return out

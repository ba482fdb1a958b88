"""OpenAI's completions: what a client asks, checked, and what it is told, as JSON values."""

import dataclasses
import secrets
import time
from collections.abc import Callable, Iterator
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
"""The finish_reason of what will not be finished, because the server ends."""


@dataclasses.dataclass(frozen=True)
class Limits(Config):
    """What one request may ask."""

    max_tokens: int = 4096
    prompt_tokens: int = 65536
    choices: int = 32
    """`n` times the number of prompts."""
    body_bytes: int = 1 << 20


@dataclasses.dataclass(frozen=True)
class Options(Config):
    """A body's fields without `prompt`. Their names and defaults are OpenAI's; the last two are
    vLLM's."""

    model: str | None = None
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    stop: str | tuple[str, ...] = ()
    seed: int | None = None
    """Choice i of n is drawn with seed + i. None: by chance."""
    logprobs: int | None = None
    echo: bool = False
    stream: bool = False
    user: str | None = None
    best_of: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    suffix: str | None = None
    top_k: int = 0
    return_token_ids: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    def problems(self) -> list[str]:
        out = self._check_ints(0, "max_tokens", "logprobs") + self._check_ints(1, "n")
        try:
            GenerationConfig(
                1, self.temperature, self.top_k, self.top_p, 1, self.seed or 0, self.stops
            )
        except ConfigError as error:
            out += error.problems
        if len(self.stops) > 4:
            out.append(f"{len(self.stops)} stop texts; at most 4 are supported")
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
class Asked:
    """A request for completions, checked."""

    options: Options
    prompts: list[Prompt]
    seed: int
    include_usage: bool = False
    """Whether a stream ends with how many tokens there were."""


def parse(body: Any, tokenizer: Tokenizer, limits: Limits) -> Asked:
    """Raises UserError."""
    if not isinstance(body, dict):
        raise UserError("expected a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    prompt = given.pop("prompt", None)
    stream_options, bias = given.pop("stream_options", {}), given.pop("logit_bias", {})
    names = [field.name for field in dataclasses.fields(Options)]
    for name in given:
        if name not in names:
            raise UserError(f"unknown parameter {name!r}{config_io.near_miss(name, names)}")
    if bias:
        raise UserError("logit_bias is not supported")
    if not isinstance(stream_options, dict) or (stream_options and not given.get("stream")):
        raise UserError("stream_options is an object that goes with stream")
    options = Options(**given)
    if options.max_tokens > limits.max_tokens:
        raise UserError(f"max_tokens {options.max_tokens} is more than {limits.max_tokens}")
    prompts = list(_prompts(prompt, tokenizer, limits))
    if len(prompts) * options.n > limits.choices:
        count = f"{len(prompts)} prompts x n {options.n}"
        raise UserError(f"{count} are more than {limits.choices} completions")
    seed = secrets.randbelow(INT_LIMIT) if options.seed is None else options.seed
    usage = bool(stream_options.get("include_usage"))
    return Asked(options, prompts, seed, usage)


def _prompts(given: Any, tokenizer: Tokenizer, limits: Limits) -> Iterator[Prompt]:
    """Raises UserError."""
    several = isinstance(given, list) and given and all(isinstance(x, (str, list)) for x in given)
    for prompt in given if several else [given]:
        if prompt is None or isinstance(prompt, str):
            ids = prompt_ids(tokenizer, prompt)
            text = tokenizer.decode(ids.tolist()) if prompt is None else prompt
        else:
            ids = check_ids(prompt, tokenizer.n_vocab)
            text = tokenizer.decode(ids.tolist())
        if len(ids) > limits.prompt_tokens:
            raise UserError(f"a prompt of {len(ids)} tokens is longer than {limits.prompt_tokens}")
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
    """One of a request's texts, which grows: a listener of its stream.

    With `logprobs` a token is told when all of its text is: `text_offset` is where it begins in the
    choice's text, and two tokens that make one character together begin at the same place.
    """

    def __init__(
        self, index: int, prompt: Prompt, asked: Asked, tokenizer: Tokenizer,
        send: Callable[[dict[str, Any]], None],
    ):  # fmt: skip
        """`send` gets what is new, in the engine's thread; the last one has a `finish_reason`."""
        self.drawn = 0
        """Tokens, up to the end of the text."""
        self._index, self._prompt, self._asked = index, prompt, asked
        self._tokenizer, self._send = tokenizer, send
        self._grown = GrowingText(tokenizer, asked.options.stops, tokenizer.eot)
        self._told = _Logprobs(tokenizer, asked.options.logprobs)
        self._begun = False
        self._sent = 0
        """Characters."""

    def stream(self) -> Stream:
        """For the engine."""
        options, ranked = self._asked.options, self._asked.options.logprobs is not None
        request = Request(
            self._prompt.ids,
            options.max_tokens,
            # All of them are no filter.
            Sampling(
                options.temperature,
                options.top_k if options.top_k < self._tokenizer.n_vocab else 0,
                options.top_p,
            ),
            (self._asked.seed + self._index % options.n) % INT_LIMIT,
            ranked=ranked,
            prompt_ranked=ranked and options.echo,
        )
        return Stream(request, self)

    def __call__(self, stream: Stream, piece: Piece) -> bool:
        text = ""
        if not self._begun and self._asked.options.echo:
            text = self._prompt.text
            if self._told.wanted is not None:
                self._tell_prompt(stream.prompt_ranks)
        before = len(self._prompt.text) if self._asked.options.echo else 0
        reason = None
        ids = self._extend(piece, before)
        if self._grown.ended:
            reason = "stop"
        elif piece.last or piece.closed:
            reason, self._grown.ended = CLOSED if piece.closed else "length", True
        text += self._grown.take()
        self._sent += len(text)
        logprobs = self._told.take(self._sent, reason is not None)
        choice = {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
        if self._asked.options.return_token_ids:
            choice["token_ids"] = ids
            choice["prompt_token_ids"] = None if self._begun else self._prompt.ids.tolist()
        if text or reason or "token_ids" in choice or (logprobs and logprobs["tokens"]):
            self._begun = True
            self._send(choice)
        return reason is None

    def _extend(self, piece: Piece, before: int) -> list[int]:
        """Add its tokens, until the text ends; those that count."""
        if self._told.wanted is None and not self._asked.options.stops:
            self._grown.extend(piece.ids)
            ids = piece.ids.tolist()
            count = ids.index(self._tokenizer.eot) + 1 if self._grown.ended else len(ids)
            self.drawn += count
            return ids[:count]
        taken = []
        for i, id_ in enumerate(piece.ids.tolist()):
            start = before + self._grown.whole
            self._grown.extend(piece.ids[i : i + 1])
            taken.append(id_)
            if piece.ranks and id_ != self._tokenizer.eot:
                end = before + self._grown.whole
                self._told.add(id_, start, end, *(x[i] for x in piece.ranks))
            if self._grown.ended:
                break
        self.drawn += len(taken)
        return taken

    def _tell_prompt(self, ranks: Ranks | None) -> None:
        grown, length = GrowingText(self._tokenizer), len(self._prompt.text)
        for i, id_ in enumerate(self._prompt.ids):
            start = min(grown.whole, length)
            grown.extend(self._prompt.ids[i : i + 1])
            known = ranks is not None and not np.isnan(ranks.logprobs[i])
            found = (x[i] for x in ranks) if ranks and known else (None, (), ())
            # The token that stands for an empty prompt is none of its text.
            self._told.add(int(id_), start, min(grown.whole, length), *found)


class _Logprobs:
    """Tokens that wait to be told."""

    def __init__(self, tokenizer: Tokenizer, wanted: int | None):
        """`wanted`: alternatives at each place; None: nothing is told."""
        self.wanted = wanted
        self._tokenizer = tokenizer
        self._waiting: list[tuple[int, int, dict[str, Any]]] = []

    def add(self, id_: int, start: int, end: int, logprob: Any, ids: Any, logprobs: Any) -> None:
        """The token has the text's characters from `start` to `end`."""
        own = spell(self._tokenizer, id_)
        top = None
        if logprob is not None:
            top = {
                spell(self._tokenizer, int(i)): round(float(x), 6)
                for i, x in zip(ids[: self.wanted], logprobs, strict=False)
            }
            logprob = round(float(logprob), 6)
            top.setdefault(own, logprob)
        fields = {"tokens": own, "token_logprobs": logprob, "top_logprobs": top}
        self._waiting.append((start, end, fields | {"text_offset": start}))

    def take(self, sent: int, all_of_them: bool) -> dict[str, list[Any]] | None:
        """Those whose text is among the first `sent` characters; at the end also the last one, of
        which a stop text may have left only the beginning."""
        if self.wanted is None:
            return None
        taken = []
        for start, end, fields in self._waiting:
            if not (end <= sent or (all_of_them and start < sent)):
                break
            taken.append(fields)
        self._waiting = self._waiting[len(taken) :]
        names = "tokens", "token_logprobs", "top_logprobs", "text_offset"
        return {name: [fields[name] for fields in taken] for name in names}


def spell(tokenizer: Tokenizer, id_: int) -> str:
    """A token alone, for people: its text, or its bytes where they are no whole characters."""
    text = tokenizer.decode([id_])
    if text and "\ufffd" not in text:
        return text
    if isinstance(tokenizer, Gpt2Tokenizer) and id_ < len(tokenizer.pieces):
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.pieces[id_])
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.piece(id_)
    return text


class Answer:
    """What all that is told about one request has in common."""

    def __init__(self, model: str, asked: Asked):
        self._asked = asked
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Of a stream."""
        usage = {"usage": None} if self._asked.include_usage else {}
        return self._head | {"choices": choices} | usage

    def usage(self, choices: list[Choice]) -> dict[str, Any]:
        """The last chunk, or the last field."""
        read = sum(len(prompt.ids) for prompt in self._asked.prompts)
        drawn = sum(choice.drawn for choice in choices)
        counts = {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}
        return self._head | {"choices": [], "usage": counts}

    def whole(self, choices: list[Choice], news: list[dict[str, Any]]) -> dict[str, Any]:
        """Not streamed: all that was `send` by the choices, put together."""
        texts: list[dict[str, Any]] = []
        for index in range(len(choices)):
            own = [new for new in news if new["index"] == index]
            texts.append(own[0])
            for new in own[1:]:
                texts[-1] = _joined(texts[-1], new)
        return self.usage(choices) | {"choices": texts}


def _joined(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    out = b | {"text": a["text"] + b["text"]}
    if b["logprobs"]:
        out["logprobs"] = {
            name: a["logprobs"][name] + b["logprobs"][name] for name in a["logprobs"]
        }
    if "token_ids" in b:
        out |= {
            "token_ids": a["token_ids"] + b["token_ids"],
            "prompt_token_ids": a["prompt_token_ids"],
        }
    return out

"""Requests share rows, and none can tell: its text is what it would be alone, and what the model
says by numpy."""

import dataclasses
import random
import threading

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest
from small_models import random_params

from gptjax.config import ModelConfig
from gptjax.decode_layout import unstack
from gptjax.errors import UserError
from gptjax.sampling import Sampling, generate
from gptjax.serving import decoder, engine
from gptjax.serving.decoder import Decoder
from gptjax.serving.engine import Closed, Engine, Full, Request, Stream, window_start

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=61, bias=False)
PARAMS = {
    name: x if name != "ln_f" else {"scale": 1 + x["scale"]}
    for name, x in random_params(CONFIG, scale=0.7).items()
}
ROWS = 2 * decoder.GROUP


class Reader:
    """A listener that keeps all it hears."""

    def __init__(self, stop_after: int | None = None):
        self.ids, self.logprobs, self.top, self.pieces = [], [], [], []
        self._stop_after = stop_after

    def __call__(self, stream, piece):
        self.pieces.append(piece)
        self.ids += piece.ids.tolist()
        if piece.ranks:
            self.logprobs += piece.ranks.logprobs.tolist()
            self.top += piece.ranks.top_ids.tolist()
        return self._stop_after is None or len(self.ids) < self._stop_after


@pytest.fixture(autouse=True)
def _time_enough(monkeypatch):
    """How much a step does does not depend on how fast the machine is."""
    monkeypatch.setattr(engine, "INTERVAL", 3600.0)


def run_until_idle(served: Engine, requests) -> list[Reader]:
    readers = [Reader() for _ in requests]
    served.submit([Stream(*each) for each in zip(requests, readers, strict=True)])
    for _ in range(10_000):
        if not served.step():
            return readers
    raise AssertionError("it never ends")


def make(config=CONFIG, params=PARAMS, rows=ROWS, queue=100) -> Engine:
    return Engine(Decoder(unstack(params, config), config, rows), queue)


@pytest.fixture(scope="module")
def shared():
    """An engine. Whatever it is asked, nobody waits for the compiler."""
    found = make(params=jax.device_put(PARAMS, jax.devices()[0]))  # as a run has them
    found.decoder.warm()
    programs = found.decoder._decode, found.decoder._read, found.decoder._look
    assert [program._cache_size() for program in programs] == [1, 1, 1]
    yield found
    assert [program._cache_size() for program in programs] == [1, 1, 1]


def mixed(count: int, seed: int = 0) -> list[Request]:
    """Requests of all kinds: short and long, greedy and wild, filtered and not."""
    draw = random.Random(seed)
    return [
        Request(
            np.array(draw.choices(range(61), k=draw.randint(1, 40)), np.int32),
            draw.randint(1, 60),
            Sampling(
                draw.choice([0.0, 0.7, 1.5]), draw.choice([0, 3]), draw.choice([0.8, 1.0]),
                draw.choice([0.0, 0.1]), draw.choice([1.0, 1.0, 1.4]),
            ),
            seed=draw.randrange(1000),
            ranked=draw.random() < 0.5,
            prompt_ranked=draw.random() < 0.5,
        )
        for _ in range(count)
    ]  # fmt: skip


def test_a_text_is_the_same_alone_and_among_others(shared):
    requests = mixed(40)
    together = run_until_idle(shared, requests)  # they join as others end, in any row
    for request, reader in zip(requests, together, strict=True):
        (alone,) = run_until_idle(shared, [request])
        assert alone.ids == reader.ids and len(alone.ids) == request.max_new_tokens
        assert alone.logprobs == reader.logprobs and alone.top == reader.top


def test_a_text_is_the_one_that_generate_writes(shared):
    for request, reader in zip(mixed(12, 1), run_until_idle(shared, mixed(12, 1)), strict=True):
        expected = generate(
            PARAMS, request.prompt, request.max_new_tokens, CONFIG, request.sampling,
            seed=request.seed, overflow="half",
        )  # fmt: skip
        assert reader.ids == np.concatenate(list(expected), axis=1)[0].tolist()


@pytest.mark.parametrize("block", [1, 2, 5, 16])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_greedy_tokens_and_what_is_told_of_them_are_numpys(shared, length, block):
    config = dataclasses.replace(CONFIG, block_size=block)
    params = PARAMS | {"wpe": PARAMS["wpe"][:block]}
    served = shared if block == 16 else make(config, params, rows=1)
    prompt = np.arange(length, dtype=np.int32) * 11 % 61
    asked = Request(prompt, 30, Sampling(0.0), ranked=True)
    (reader,) = run_until_idle(served, [asked])
    text, start = prompt.tolist(), max(0, length - block)
    for id_, logprob, top in zip(reader.ids, reader.logprobs, reader.top, strict=True):
        if len(text) - start > block:  # full: half of it is dropped
            start = len(text) - max(1, block // 2)
        logits = numpy_gpt.forward(config, params, text[start:])[0][-1]
        assert id_ == logits.argmax() == top[0]
        assert top == np.argsort(-logits)[: decoder.ALTERNATIVES].tolist()
        assert logprob == pytest.approx(logits.max() - np.log(np.exp(logits).sum()), abs=1e-4)
        assert start == window_start(len(text) - 1, length, block)
        text.append(id_)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 30])
def test_a_prompts_tokens_are_ranked_as_by_numpy(shared, length):
    prompt = np.arange(length, dtype=np.int32) * 11 % 61
    stream = Stream(Request(prompt, 0, prompt_ranked=True), Reader())
    shared.submit([stream])
    shared.step()
    if length == 1:
        assert stream.prompt_ranks is None  # nothing is before it
        return
    start = max(0, length - 16)
    found = stream.prompt_ranks.logprobs
    assert np.isnan(found[: start + 1]).all() and len(found) == length
    expected = -numpy_gpt.nats(CONFIG, PARAMS, prompt[None, start:])[0]
    assert found[start + 1 :] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("piece", [256, 4])
def test_a_prompt_is_read_in_pieces(monkeypatch, piece):
    monkeypatch.setattr(decoder, "PIECE", piece)
    monkeypatch.setattr(
        decoder, "bucket", lambda length, most: most
    )  # no power of two: pieces overlap
    config = dataclasses.replace(CONFIG, block_size=14)
    params = PARAMS | {"wpe": PARAMS["wpe"][:14]}
    prompt = np.arange(14, dtype=np.int32) * 7 % 61
    reader = run_until_idle(make(config, params, 1), [Request(prompt, 1, Sampling(0.0))])[0]
    assert reader.ids == numpy_gpt.greedy(config, params, prompt, 1)


@pytest.mark.parametrize("length", [1, 9, 16])
def test_attention_is_numpys(shared, length):
    prompt = np.arange(length, dtype=np.int32) * 11 % 61
    stream = Stream(Request(prompt, 0, look=True), Reader())
    shared.submit([stream])
    shared.step()
    expected = numpy_gpt.forward(CONFIG, PARAMS, prompt)[1][:, :, -1]
    assert stream.attention == pytest.approx(expected, abs=1e-5)
    assert stream.attention.shape == (2, 2, length)


def endless(**options) -> Request:
    return Request(np.array([1], np.int32), 10**6, **options)


def test_a_row_is_free_at_once(shared):
    reader, others = Reader(stop_after=5), [Stream(endless(), Reader()) for _ in range(ROWS - 1)]
    shared.submit([Stream(endless(), reader), *others])
    late = Reader()
    shared.submit([Stream(Request(np.array([2], np.int32), 3), late)])
    shared.step()
    assert len(reader.pieces) == 1 and shared.busy == ROWS  # one has ended, and one waits
    shared.step()
    assert len(late.ids) == 3 and shared.busy == ROWS - 1
    for stream in others:
        stream.cancel()
    assert not shared.step() and shared.busy == 0


def test_a_request_that_nobody_wants_any_more_never_gets_a_row(shared):
    reader = Reader()
    stream = Stream(endless(), reader)
    shared.submit([stream])
    stream.cancel()
    assert not shared.step() and not reader.pieces


def test_nobody_is_overtaken_by_those_who_come_later(monkeypatch):
    """Though each step has time to read only one piece of one prompt."""
    monkeypatch.setattr(engine, "INTERVAL", -1.0)
    served, done = make(rows=2), []

    def listener(number):
        return lambda stream, piece: done.append(number) or False

    prompt = np.arange(9, dtype=np.int32)
    served.submit([Stream(Request(prompt, 1), listener(number)) for number in range(9)])
    while served.step():
        pass
    assert done == [*range(9)]


def test_too_many_are_refused_and_none_of_them_is_taken():
    served = make(rows=2, queue=1)
    served.submit([Stream(endless(), Reader()) for _ in range(2)])
    with pytest.raises(UserError, match="4 completions at once; this server takes 3"):
        served.submit([Stream(endless(), Reader()) for _ in range(4)])
    with pytest.raises(Full, match="completions, with room for"):
        served.submit([Stream(endless(), Reader()) for _ in range(2)])
    assert served.busy == 2
    served.submit([Stream(endless(), Reader())])


@pytest.fixture
def small_pieces(monkeypatch):
    """Prompts are read two tokens at a time, and others draw in between."""
    monkeypatch.setattr(engine, "INTERVAL", 1e-9)
    monkeypatch.setattr(decoder, "PIECE", 2)
    monkeypatch.setattr(decoder, "bucket", lambda length, most: most)


def test_what_others_draw_while_a_prompt_is_read_changes_no_text(small_pieces):
    requests = mixed(12, 2)
    for request, reader in zip(requests, run_until_idle(make(rows=4), requests), strict=True):
        expected = generate(
            PARAMS, request.prompt, request.max_new_tokens, CONFIG, request.sampling,
            seed=request.seed, overflow="half",
        )  # fmt: skip
        assert reader.ids == np.concatenate(list(expected), axis=1)[0].tolist()


def test_a_long_prompt_does_not_stop_those_that_draw(small_pieces):
    served, drawing = make(rows=2), Reader()
    served.submit([Stream(endless(), drawing)])
    served.step()
    late = Reader()
    served.submit([Stream(Request(np.arange(16, dtype=np.int32), 1), late)])
    counts = []
    while not late.ids and len(counts) < 20:
        served.step()
        counts.append(len(drawing.ids))
    assert late.ids and counts == sorted(set(counts)) and len(counts) > 7  # 15 tokens by twos


def test_it_serves_in_a_thread_and_tells_when_it_closes():
    served, reader, went_on = make(rows=1), Reader(), threading.Event()

    def listen(stream, piece):
        went_on.set()
        return reader(stream, piece)

    thread = threading.Thread(target=served.run)
    thread.start()
    waiting = Reader()
    served.submit([Stream(endless(), listen), Stream(endless(), waiting)])
    assert went_on.wait(60)
    served.close()
    thread.join(60)
    assert not thread.is_alive() and reader.pieces[-1].closed and waiting.pieces[-1].closed
    with pytest.raises(Closed):
        served.submit([Stream(endless(), Reader())])


@pytest.mark.parametrize(("streams", "groups"), [(1, 1), (8, 1), (9, 2)])
def test_a_group_without_work_costs_nothing(monkeypatch, streams, groups):
    served, widths = make(rows=17), []
    decode = served.decoder._decode

    def counted(params, cache, rows, *more):
        widths.append(len(rows.token))
        return decode(params, cache, rows, *more)

    monkeypatch.setattr(served.decoder, "_decode", counted)
    served.submit([Stream(endless(), Reader()) for _ in range(streams)])
    served.step()
    assert widths == [8] * groups and served.decoder.rows == 24


def test_rows_are_independent_to_the_last_bit(shared):
    """A matrix product may sum in another order for another row; the texts rely on it that it does
    not."""
    rows = decoder.Rows.resting(ROWS)
    rows.token[:], rows.steps[:], rows.seed[:] = 7, 20, 3
    tokens, ranks = Decoder(unstack(PARAMS, CONFIG), CONFIG, ROWS).decode(rows, True)
    for x in (tokens, *ranks):
        assert (x == x[:, :1]).all()
    assert jnp.ptp(tokens[:20, 0]) > 0

"""The server as its clients meet it: OpenAI's own, a browser, and those who mean no good."""

import contextlib
import http.client
import json
import socket
import time

import numpy as np
import numpy_gpt
import pytest
from helpers import TEXT

pytest.importorskip("uvicorn", reason="serving needs starlette and uvicorn")
from local_server import serve

from gptjax.errors import UserError
from gptjax.serving import app
from gptjax.serving.engine import Request, Stream

openai = pytest.importorskip("openai", reason="the client that the server must satisfy")

PROMPT = "RICHARD:\nNow "
NAMES = "token_logprobs", "top_logprobs"


@pytest.fixture
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def request(served, method, path, body=None, **headers):
    """(status, what it answered, its headers)."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        headers.setdefault("content-type", "application/json")
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    json_like = response.headers["content-type"] == "application/json"
    return response.status, json.loads(text) if json_like else text, response.headers


def wait_until(true, seconds=30.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_openais_client_gets_the_text_that_generate_writes(served, client):
    settings = {"temperature": 0.9, "top_p": 0.9, "seed": 5, "stop": "\n\n"}
    more = {"top_k": 20}
    found = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=60, extra_body=more, **settings
    )
    expected = served.run.generate(
        PROMPT, max_new_tokens=60, overflow="half", **more | settings | {"stop": ("\n\n",)}
    )
    assert found.choices[0].text == expected
    assert found.object == "text_completion" and found.model == "tiny"
    assert found.usage.prompt_tokens == len(PROMPT)
    assert found.usage.total_tokens == len(PROMPT) + found.usage.completion_tokens


def test_choices_are_what_they_are_alone_streamed_or_not(served, client):
    prompts, asked = [PROMPT, "H"], {"model": "tiny", "max_tokens": 40, "seed": 1}
    together = client.completions.create(prompt=prompts, n=2, **asked)
    alone = [
        client.completions.create(prompt=prompt, **asked | {"seed": seed}).choices[0].text
        for prompt in prompts
        for seed in (1, 2)
    ]
    assert [choice.text for choice in together.choices] == alone and len(set(alone)) == 4
    texts, reasons = [""] * 4, [None] * 4
    options = {"include_usage": True}
    for chunk in client.completions.create(
        prompt=prompts, n=2, stream=True, stream_options=options, **asked
    ):
        usage = chunk.usage
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == alone and reasons == ["length"] * 4
    assert usage == together.usage


def test_logprobs_and_echo_are_numpys(served, client):
    text = TEXT[:16]
    found = client.completions.create(
        model="tiny", prompt=text, max_tokens=0, echo=True, logprobs=3
    ).choices[0]
    ids = served.run.tokenizer.encode(text)
    expected = -numpy_gpt.nats(served.run.config, served.run.params, ids[None])[0]
    assert found.text == text and found.finish_reason == "length"
    assert found.logprobs.tokens == list(text)
    assert found.logprobs.text_offset == list(range(16))
    assert found.logprobs.token_logprobs[0] is None
    assert found.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    for own, top in list(zip(*map(found.logprobs.__getattribute__, NAMES), strict=True))[1:]:
        assert own in top.values() and len(top) in (3, 4)


def test_the_client_is_told_what_is_wrong(served, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    for call in (
        lambda: client.models.retrieve("gpt-4"),
        lambda: client.completions.create(model="gpt-4", prompt="a"),
    ):
        with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'; this server has 'tiny'"):
            call()
    with pytest.raises(openai.BadRequestError, match=r"temperature -1\.0 is outside") as error:
        client.completions.create(model="tiny", prompt="N", temperature=-1.0)
    assert error.value.type == "invalid_request_error"


def test_too_many_requests_are_told_to_come_again(tiny):
    with serve(tiny.run, rows=1, queue=0, driven=False) as full:
        full.engine.submit([Stream(Request(np.array([1]), 9), lambda *_: True)])
        client = openai.OpenAI(base_url=f"{full.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError, match="try again soon") as error:
            client.completions.create(model="tiny", prompt="N")
        assert error.value.response.headers["retry-after"] == "1"
        with pytest.raises(
            openai.BadRequestError, match="2 completions at once; this server takes 1"
        ):
            client.completions.create(model="tiny", prompt="N", n=2)


@pytest.mark.parametrize("stream", [True, False])
def test_who_disconnects_frees_the_rows(served, stream):
    body = {"prompt": PROMPT, "max_tokens": 10**9, "n": 3, "stream": stream}
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(head.encode() + data)
        if stream:
            connection.recv(10)
        wait_until(lambda: served.engine.busy == 3)
    wait_until(lambda: served.engine.busy == 0)
    assert request(served, "GET", "/health")[:2] == (200, {"status": "ok", "requests": 0})


BEGUN = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize("sent", ["", "GET / HT", f"{BEGUN}content-length: 99\r\n\r\n{{"])
def test_a_client_that_never_finishes_its_request_is_disconnected(served, monkeypatch, sent):
    monkeypatch.setattr(app, "PATIENCE", 0.3)
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        connection.sendall(sent.encode())
        with contextlib.suppress(ConnectionResetError):
            assert not connection.recv(1)


def test_a_client_that_stops_reading_frees_its_row(served, monkeypatch):
    monkeypatch.setattr(app, "PATIENCE", 0.3)
    body = {"prompt": PROMPT, "max_tokens": 10**9, "stream": True, "logprobs": 10}
    data = json.dumps(body)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(f"{BEGUN}content-length: {len(data)}\r\n\r\n{data}".encode())
        connection.recv(10)
        wait_until(lambda: served.engine.busy == 1)
        wait_until(lambda: served.engine.busy == 0)


def test_a_client_that_reads_slowly_is_not_disconnected(served, monkeypatch):
    monkeypatch.setattr(app, "PATIENCE", 0.1)
    data = json.dumps({"prompt": PROMPT, "max_tokens": 400, "stream": True, "logprobs": 10})
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        connection.sendall(f"{BEGUN}content-length: {len(data)}\r\n\r\n{data}".encode())
        answer = b""
        while not answer.endswith(b"[DONE]\n\n\r\n0\r\n\r\n"):
            answer += connection.recv(2000)
            time.sleep(0.005)


def test_a_server_that_ends_says_so(tiny):
    with serve(tiny.run, rows=1) as ending:
        client = openai.OpenAI(base_url=f"{ending.url}/v1", api_key="none", max_retries=0)
        chunks = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=10**9, stream=True
        )
        next(iter(chunks))
        ending.engine.close()
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(chunks)
        with pytest.raises(
            openai.InternalServerError, match="the server is shutting down"
        ) as error:
            client.completions.create(model="tiny", prompt=PROMPT)
        assert error.value.status_code == 503


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"host": "evil.example"}, "not called 'evil.example'"),
        ({"host": "127.0.0.1.evil.example:80"}, "not called"),
        ({"host": ""}, "not called ''"),
        ({"origin": "https://evil.example"}, "pages of https://evil.example may not use"),
        ({"origin": "null"}, "pages of null may not use"),
        ({"host": "localhost:1", "origin": "http://localhost:2"}, "may not use"),
    ],
)
def test_other_sites_pages_are_refused(served, headers, words):
    for method, path, body in (
        ("GET", "/", None),
        ("GET", "/v1/models", None),
        ("POST", "/v1/completions", {"prompt": "N"}),
    ):
        status, answer, _ = request(served, method, path, body, **headers)
        assert status == 403 and words in answer["error"]["message"]


@pytest.mark.parametrize("host", ["localhost:1", "[::1]:1", "10.1.2.3", "MY.host", "127.0.0.1"])
def test_its_own_names_and_page_are_let_through(served, host):
    status, _, headers = request(served, "GET", "/v1/models", host=host, origin=f"http://{host}")
    assert status == 200
    assert not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        (b"{", {}, 400, "not JSON"),
        (b"[" * 100_000, {}, 400, "not JSON"),
        (b"\xff", {}, 400, "not JSON"),
        ({"prompt": "x" * 2_000_000}, {}, 413, "longer than 1048576 bytes"),
        ({"prompt": "N"}, {"content_type": "text/plain"}, 415, "application/json"),
        ({"prompt": "N", "stop": 3}, {}, 400, "stop is 3"),
        ({"prompt": "\ud800"}, {}, 400, "U+D800"),
    ],
)
def test_bad_bodies_are_refused(served, body, headers, status, words):
    found, answer, _ = request(served, "POST", "/v1/completions", body, **headers)
    assert found == status and words in answer["error"]["message"]


def test_there_is_nothing_else(served):
    assert request(served, "GET", "/v1/chat/completions")[0] == 404
    status, answer, _ = request(served, "GET", "/v1/completions")
    assert status == 405 and "GET /v1/completions" in answer["error"]["message"]


def test_attention_is_told_for_one_token(served):
    text = TEXT[:40]
    ids = served.run.tokenizer.encode(text)
    status, answer, _ = request(
        served, "POST", "/api/attention", {"tokens": ids.tolist(), "position": 20}
    )
    assert status == 200 and answer["start"] == 5  # of 40 tokens of a prompt, those up to it
    seen = ids[answer["start"] : 21]
    expected = numpy_gpt.forward(served.run.config, served.run.params, seen)[1][:, :, -1]
    assert np.array(answer["attention"]) == pytest.approx(expected, abs=1e-4)
    assert "".join(answer["tokens"]) == text[answer["start"] : 21]
    by_text = request(served, "POST", "/api/attention", {"text": text[:9]})[1]
    assert np.array(by_text["attention"]).shape == (1, 2, 9)


def test_the_page_needs_nothing_from_outside(served):
    status, page, headers = request(served, "GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "http://" not in page and "https://" not in page and "//cdn" not in page
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert policy.count("'sha256-") == 2 and "unsafe" not in policy
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", ["/", "/v1/models", "/nothing"])
@pytest.mark.parametrize("host", ["localhost", "evil.example"])
def test_no_other_site_can_use_an_answer(served, path, host):
    headers = request(served, "GET", path, host=host)[2]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"


def test_a_port_in_use_is_one_clear_line(served):
    with pytest.raises(UserError, match=rf"port {served.port}: Address already in use; choose"):
        app.listen("127.0.0.1", served.port)
    with pytest.raises(UserError, match="cannot listen on no such host"):
        app.listen("no such host", 0)

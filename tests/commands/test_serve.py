"""gptjax serve: its flags, and its process from start to Ctrl-C."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time

import helpers
import pytest

from gptjax import serving
from gptjax.errors import UserError

uvicorn = pytest.importorskip("uvicorn", reason="serving needs starlette and uvicorn")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nope"], "no run in nope"),
        (["RUN", "--port", "65536"], r"port 65536 is outside \[0, 65535\]"),
        (["RUN", "--rows", "0", "--queue", "-1"], "rows 0 must be at least 1; queue -1 must be"),
        (["RUN", "--host", "no.such.host.", "--port", "0"], "cannot listen on no.such.host."),
    ],
)
def test_serve_refuses_bad_input(trained, gptjax, argv, words):
    with pytest.raises(UserError, match=words):
        gptjax("serve", *(trained[0] if x == "RUN" else x for x in argv))


def test_serve_says_what_to_install(trained, gptjax, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "gptjax.serving.app", raising=False)
    monkeypatch.delattr(serving, "app", raising=False)
    with pytest.raises(UserError, match="pip install starlette uvicorn"):
        gptjax("serve", trained[0])


@pytest.fixture
def process(trained, cache_dir):
    """A server's process, and its port."""
    found = subprocess.Popen(
        [sys.executable, "-m", "gptjax", "serve", trained[0], "--port", "0", "--rows", "2"],
        env=helpers.command_environment(cache_dir), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    said = helpers.wait_for(found, "serving")
    yield found, int(re.search(r"on http://127\.0\.0\.1:(\d+) \(Ctrl-C ends it\)\n", said)[1])
    found.kill()
    found.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once(process, number):
    server, port = process
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"prompt": "RICHARD", "max_tokens": 4096, "stream": True}
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"}
    )
    assert connection.getresponse().read(20).startswith(b"data: {")
    began = time.monotonic()
    server.send_signal(number)
    out, err = server.communicate(timeout=60)
    assert server.returncode == 128 + number and time.monotonic() - began < 10
    assert (out, err) == ("", "stopped; nothing is left half done\n")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


@pytest.mark.slow
def test_a_port_in_use_is_one_clear_line(trained, command):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = command("-m", "gptjax", "serve", trained[0], "--port", port)
    helpers.assert_one_clear_line(result, f"port {port}: Address already in use", "--port")

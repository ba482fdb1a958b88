"""A server in the tests' own process."""

import contextlib
import threading

from gptjax.decode_layout import unstack
from gptjax.serving import app
from gptjax.serving.completions import Limits
from gptjax.serving.decoder import Decoder
from gptjax.serving.engine import Engine


class Served:
    """A run, served on a free port of this machine."""

    def __init__(self, run, bound, engine):
        self.run, self.engine = run, engine
        self.port = bound.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def serve(run, rows=8, queue=40, driven=True):
    """`driven`: whether the engine runs."""
    engine = Engine(Decoder(unstack(run.params, run.config), run.config, rows), queue)
    server = app.Server(run, "tiny", engine, Limits(max_tokens=10**9))
    bound = app.listen("127.0.0.1", 0)
    thread = threading.Thread(target=engine.run)
    with app.serving(server.app(["my.host"]), bound):
        if driven:
            thread.start()
        yield Served(run, bound, engine)
        engine.close()
        if driven:
            thread.join(60)

"""gptjax serve [RUN]: a playground in the browser, and an HTTP interface like OpenAI's."""

import dataclasses
from typing import Literal

from gptjax import files
from gptjax.commands import flags, terminal
from gptjax.errors import UserError
from gptjax.runtime_config import DeviceKind
from gptjax.settings import Config


@dataclasses.dataclass(frozen=True)
class ServeFlags(Config):
    """Serve a trained model (runs/quickstart, if no RUN is named) to several people at once: a page
    to play on, and OpenAI's POST /v1/completions. Ctrl-C ends it."""

    host: str = "127.0.0.1"
    """Address to listen on. 127.0.0.1: only this machine; 0.0.0.0: all who can reach it, without
    a password."""
    port: int = 8000
    """Port to listen on; 0: a free one."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which clients call this server, besides localhost and its addresses."""
    rows: int = 16
    """Texts drawn at the same time."""
    queue: int = 64
    """Texts that may wait for a row; more are refused (429)."""
    max_tokens: int = 4096
    """Most new tokens of a text."""
    checkpoint: str = "best"
    """best (lowest validation loss), latest, or a step."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision, and what the weights are read in. auto: the run's own."""
    device: DeviceKind = "auto"
    """Kind of device to run on."""

    def problems(self) -> list[str]:
        out = self._check_ints(1, "rows", "max_tokens") + self._check_ints(0, "queue")
        if not 0 <= self.port < 1 << 16:
            out.append(f"port {self.port} is outside [0, 65535]")
        return out


DEFAULTS = [ServeFlags()]


def main(argv: list[str], prog: str) -> None:
    """Raises UserError."""
    named, given = flags.parse(ServeFlags(), argv, prog, "[RUN]")
    run_dir = named[0] if named else "runs/quickstart"
    folder = terminal.need_run(run_dir)
    try:  # optional; and JAX is imported when the command runs, not to print its help
        from gptjax.serving import app
    except ImportError:
        raise UserError(
            "serving needs starlette and uvicorn: pip install starlette uvicorn"
        ) from None
    from gptjax import run
    from gptjax.decode_layout import unstack
    from gptjax.devices import memory, setup
    from gptjax.serving.completions import Limits
    from gptjax.serving.decoder import Decoder
    from gptjax.serving.engine import Engine

    bound = app.listen(given.host, given.port)
    setup.select_platform(given.device)
    setup.use_compilation_cache(files.cache_dir() / "xla")
    terminal.status(f"loading {run_dir} ...")
    model = run.load(run_dir, given.checkpoint, dtype=given.dtype)
    config = model.config
    memory.refuse_too_many(config, given.rows, config.block_size, setting="--rows")
    params = unstack(model.params, config, consume=True)
    engine = Engine(Decoder(params, config, given.rows), given.queue)
    terminal.status("compiling ...")
    engine.decoder.warm()
    terminal.status("")
    server = app.Server(model, folder.resolve().name, engine, Limits(max_tokens=given.max_tokens))
    with app.serving(server.app(given.allowed_hosts), bound):
        host, port = bound.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(f"serving {run_dir}, step {model.step}, on {url} (Ctrl-C ends it)", flush=True)
        engine.run()

"""A report that follows its runs: served on this machine, asked for anew every few seconds."""

import json
import sys
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from gptjax import run_logs
from gptjax.errors import UserError
from gptjax.viz import report


def serve(run_dirs: Sequence[Path], port: int) -> None:
    """Answer on 127.0.0.1 until Ctrl-C. UserError: there is no such run, or the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
            if host not in ("127.0.0.1", "localhost"):  # another site's name, made to point here
                self._answer(403, "text/plain", "this page is for this machine only")
                return
            try:
                if self.path == "/":
                    page = report.to_html(report.gather(run_dirs), live=True)
                    self._answer(200, "text/html", page)
                elif self.path == "/data":
                    self._answer(200, "application/json", json.dumps(report.gather(run_dirs)))
                else:
                    self._answer(404, "text/plain", "there is only one page")
            except UserError as error:  # a run that begins anew at this moment, or is gone
                self._answer(503, "text/plain", str(error))

        def _answer(self, status: int, kind: str, text: str) -> None:
            content = text.encode(errors="replace")
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    _wait(run_dirs)
    try:
        server = _Server(("127.0.0.1", port), Handler)
    except OSError as error:
        reason = error.strerror
        raise UserError(f"cannot use port {port}: {reason}; choose another --port") from None
    with server:
        print(f"http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A page that was closed while it was answered is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*_)  # type: ignore[arg-type]


def _wait(run_dirs: Sequence[Path]) -> None:
    """Until there is something to show of runs that have begun."""
    for run_dir in run_dirs:
        log = run_dir / "metrics.jsonl"
        while (run_dir / "config.json").exists() and not (
            log.exists() and run_logs.read_metrics(log)
        ):
            time.sleep(1)
    report.to_html(report.gather(run_dirs), live=True)  # what is wrong is said now

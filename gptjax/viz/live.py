"""A report that follows its runs: served on this machine, asked for anew every few seconds."""

import json
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from gptjax.errors import UserError
from gptjax.viz import report


def serve(run_dirs: Sequence[Path], port: int) -> None:
    """Answer on 127.0.0.1 until Ctrl-C. UserError: no losses yet, or the port is taken."""
    page = report.to_html(report.gather(run_dirs), live=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in ("127.0.0.1", "localhost"):  # another site's name, made to point here
                self.send_error(403)
            elif self.path == "/":
                self._answer("text/html; charset=utf-8", page)
            elif self.path == "/data":
                try:
                    self._answer("application/json", json.dumps(report.gather(run_dirs)))
                except UserError as error:  # a run that begins anew at this moment
                    self.send_error(503, str(error))
            else:
                self.send_error(404)

        def _answer(self, kind: str, text: str) -> None:
            content = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UserError(
            f"cannot use port {port}: {error.strerror}; choose another --port"
        ) from None
    with server:
        print(f"http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()

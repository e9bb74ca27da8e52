"""A run's page over HTTP on this machine alone, made anew as the run grows.

Owns the server. Must not know what the page shows.
"""

import http.server
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

from ngrpo_jax.errors import UserError, require

_FILES = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "summary.json")
_NAMES = ("127.0.0.1", "localhost")


def stamp(workdir: Path) -> str:
    """A text that changes when the files of the page do."""
    stats = [path.stat() for name in _FILES if (path := workdir / name).exists()]
    return "-".join(f"{stat.st_mtime_ns:x}.{stat.st_size:x}" for stat in stats)


def make_server(workdir: Path, page: Callable[[], str], port: int) -> http.server.ThreadingHTTPServer:
    """A server on the loopback interface: / is the page, /stamp changes when the page would.

    Args:
      page: makes the page; a UserError, such as for a run without a step, becomes a text that says so.
      port: 0 takes a free one.
    """
    made: dict[str, str] = {}

    def current() -> str:
        now = stamp(workdir)
        if now not in made:
            made.clear()
            made[now] = page()
        return made[now]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of another site could resolve its own name to this address: only these names are served.
            if self.headers.get("Host", "").rpartition(":")[0] not in _NAMES:
                self._send(HTTPStatus.FORBIDDEN, "text/plain", "This server answers to localhost alone.")
            elif self.path == "/stamp":
                self._send(HTTPStatus.OK, "text/plain", stamp(workdir))
            elif self.path == "/":
                try:
                    self._send(HTTPStatus.OK, "text/html", current())
                except UserError as error:
                    self._send(
                        HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"{error} Load this page again later."
                    )
            else:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", "There is only /.")

        def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing: requests are no news."""

    require(0 <= port < 65536, f"--port={port} must be from 0 to 65535.")
    try:
        return http.server.ThreadingHTTPServer((_NAMES[0], port), Handler)
    except OSError as error:
        raise UserError(f"port {port} cannot be used ({error.strerror}); choose another --port.") from error


def serve(workdir: Path, page: Callable[[], str], port: int) -> None:
    """Serves until the keyboard stops it."""
    with make_server(workdir, page, port) as server:
        print(
            f"http://{_NAMES[0]}:{server.server_port}/ shows {workdir} as it grows; Ctrl-C ends it",
            flush=True,
        )
        server.serve_forever()

"""The page's server: who may ask, for what, and how an answer is sent. views.py and runs.py make the answers.

It listens to 127.0.0.1 only. A request needs the token of the printed address, so that no other page in the browser and
no other user of the machine can ask. The Host must be this server's: otherwise another site could point its own name
at 127.0.0.1 (DNS rebinding). Nothing that the page sends is used as a path.

One thread computes, and one looks after the runs, so that a long sample delays no curve.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from quill.errors import UserError
from quill.play.contents import read_setup, write_config
from quill.play.fields import Fields, parse, read
from quill.play.runs import Runs, UnknownRun
from quill.play.views import Views

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
LIMIT, LIMIT_WITH_TEXT = 2**16, 2**22  # bytes of a request
LOOK, ALIVE = 0.25, 10.0  # seconds between looks at a run, and between signs of life in a stream
MOST_TRIES = 100  # ports


# ---------------------------------------------------------------- who may ask


class Guard:
    """Refuse what is not from the page itself, and add HEADERS to every answer."""

    def __init__(self, app: Callable, port: int, token: str):
        self.app, self.token = app, token
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:  # noqa: D102
        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = message | {"headers": [*message["headers"], *own]}
            await send(message)

        request = Request(scope)
        problem = self.problem(request)
        answer: Callable = self.app
        if problem and scope["path"] == "/":
            answer = PlainTextResponse(problem + "\n", 403)
        elif problem:
            answer = error_response(403, problem)
        await answer(scope, receive, send_with_headers)

    def problem(self, request: Request) -> str:
        """Say why a request is refused; "" if it is not."""
        hosts, origins = request.headers.getlist("host"), request.headers.getlist("origin")
        if len(hosts) != 1 or (hosts[0] if ":" in hosts[0] else f"{hosts[0]}:80") not in self.hosts:
            return "this server answers to 127.0.0.1 and localhost only"
        if any(origin not in {f"http://{host}" for host in self.hosts} for origin in origins):
            return "this server answers its own page only"
        given = request.headers.get("x-quill-token") or request.query_params.get("token", "")
        if request.url.path.startswith("/static/") or secrets.compare_digest(given.encode(), self.token.encode()):
            return ""
        return "the token is missing or old: open the address that play.py printed"


# ---------------------------------------------------------------- answers


def to_json(values: Any) -> str:
    """Make JSON of `values`, in ASCII. A number that is not finite becomes null."""
    try:
        return json.dumps(values, allow_nan=False)
    except ValueError:
        return json.dumps(without_nan(values), allow_nan=False)


def without_nan(values: Any) -> Any:
    """Replace the numbers in `values` that are not finite by None."""
    if isinstance(values, dict):
        return {key: without_nan(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [without_nan(value) for value in values]
    return None if isinstance(values, float) and values - values != 0 else values


def json_response(values: Any, status: int = 200) -> Response:
    """Answer with JSON."""
    return Response(to_json(values), status, media_type="application/json")


def error_response(status: int, text: str) -> Response:
    """Answer with one line that says what is wrong."""
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return json_response({"error": line if len(line) <= 500 else line[:499] + "…"}, status)


def explain(request: Request, error: Exception) -> Response:
    """Turn an exception into an answer. The traceback of a bug is printed."""
    if isinstance(error, HTTPException):
        return error_response(error.status_code, error.detail)
    if isinstance(error, UserError):
        return error_response(404 if isinstance(error, UnknownRun) else 400, str(error))
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)
    traceback.print_exception(error, file=sys.stderr)
    return error_response(500, f"a bug in quill: {type(error).__name__}; the terminal shows where")


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body of a POST of JSON. Raise an HTTPException if it is too long or of another type."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the request must be application/json")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > 16 * limit:  # until then it is read, because a browser shows no answer to half a request
            break
    if size > limit:
        raise HTTPException(413, f"the request is longer than {limit // 1024:,} KiB")
    return b"".join(parts)


class Pages:
    """The routes, and the two threads that do their work."""

    def __init__(self, runs: Runs, selected: str, config: str | None):
        self.runs, self.views, self.setup = runs, Views(runs), {"selected": selected, "selected_config": config}
        self.computing, self.looking = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.files = {path.relative_to(STATIC).as_posix(): path for path in STATIC.rglob("*") if path.is_file()}

    def routes(self) -> list[Route]:
        """Return every address of the server."""
        views, looking, computing = self.views, self.looking, self.computing
        return [
            Route("/", self.index),
            Route("/static/{name:path}", self.static),
            Route("/api/events", self.events),
            Route("/api/config", self.config),
            answer("/api/setup", "GET", lambda _: self.read_setup(), looking),
            answer("/api/runs", "GET", lambda _: {"runs": self.runs.list()}, looking),
            answer("/api/run", "GET", lambda asked: self.runs.run(asked.name), looking),
            answer("/api/start", "POST", self.start, looking, LIMIT_WITH_TEXT),
            answer("/api/control", "POST", self.control, looking),
            answer("/api/network", "GET", views.network, computing),
            answer("/api/matrix", "GET", views.matrix, computing),
            answer("/api/token", "POST", views.token, computing),
            answer("/api/score", "POST", views.score, computing),
            answer("/api/samples", "POST", views.samples, computing),
        ]

    async def index(self, request: Request) -> Response:
        """Send the page."""
        return self.file("index.html")

    async def static(self, request: Request) -> Response:
        """Send a style, a script or a picture."""
        return self.file(request.path_params["name"])

    def file(self, name: str) -> Response:
        """Send the file of this name, which was in STATIC when the server started."""
        if name not in self.files:
            raise HTTPException(404, "there is no such file")
        return FileResponse(self.files[name], media_type=TYPES.get(self.files[name].suffix, "text/plain"))

    def read_setup(self) -> dict[str, Any]:
        """Return what the page reads first."""
        if "configs" not in self.setup:
            self.setup |= read_setup()
        return self.setup | {"datasets": self.runs.datasets()}

    def start(self, asked: Fields) -> dict[str, Any]:
        """Start a run. → the run object"""
        return self.runs.run(
            self.runs.start(asked.config, asked.run, asked.options, asked.text, asked.documents, asked.paused)
        )

    def control(self, asked: Fields) -> dict[str, Any]:
        """Let a run train, pause or take one step. → the run object"""
        self.runs.control(asked.name, asked.action)
        return self.runs.run(asked.name)

    async def config(self, request: Request) -> Response:
        """Send a config file that trains a run again."""
        name = read_query(request).name
        run = await work(self.looking, self.runs.run, name)
        return PlainTextResponse(write_config(name, run["options"]))

    async def events(self, request: Request) -> Response:
        """Send the run object now, and whenever it has changed, as Server-Sent Events."""
        name = read_query(request).name
        await work(self.looking, self.runs.signature, name)  # raises UnknownRun before the answer begins
        stream = self.changes(name) if request.method == "GET" else ()
        return StreamingResponse(stream, media_type="text/event-stream")

    async def changes(self, name: str) -> AsyncIterator[str]:
        """Yield the events of a run, until it is deleted or the reader goes away."""
        last, quiet = None, 0.0
        while True:
            try:
                signature = await work(self.looking, self.runs.signature, name)
                if (signature,) != last:
                    last, quiet = (signature,), 0.0
                    yield f"data: {to_json(await work(self.looking, self.runs.run, name))}\n\n"
            except UserError:
                return
            if quiet >= ALIVE:
                quiet = 0.0
                yield ": still here\n\n"
            await asyncio.sleep(LOOK)
            quiet += LOOK


async def work(worker: ThreadPoolExecutor, function: Callable, *args: Any) -> Any:
    """Call a function in the thread of `worker`."""
    return await asyncio.get_running_loop().run_in_executor(worker, function, *args)


def read_query(request: Request) -> Fields:
    """Read the fields of a GET."""
    return read({key: value for key, value in request.query_params.items() if key != "token"})


def answer(path: str, method: str, function: Callable, worker: ThreadPoolExecutor, limit: int = LIMIT) -> Route:
    """Make a route that calls `function` with a request's fields in the thread of `worker`, and sends its JSON."""

    async def endpoint(request: Request) -> Response:
        is_post = method == "POST"
        asked = read(parse(await read_body(request, limit))) if is_post else read_query(request)
        return json_response(await work(worker, function, asked))

    return Route(path, endpoint, methods=[method])


# ---------------------------------------------------------------- the server


class Server(uvicorn.Server):
    """A server that a signal ends at once, also while a page listens to its events. Nothing is lost by that."""

    def handle_exit(self, sig: int, frame: Any) -> None:  # noqa: D102
        os._exit(128 + sig)


def open_socket(port: int) -> socket.socket:
    """Listen to `port` of 127.0.0.1; 0 is any. Raise a UserError that names the next free one if it is taken."""
    for number in range(port, min(port + MOST_TRIES, 65536)):
        listening = socket.socket()
        if os.name == "posix":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left is free
        try:
            listening.bind(("127.0.0.1", number))
            listening.listen()
        except OSError as error:
            listening.close()
            problem = error.strerror
            continue
        if number == port:
            return listening
        listening.close()
        raise UserError(f"--port={port}: {problem}; --port={number} is free")
    raise UserError(f"--port={port}: no port from there on is free")


def serve(port: int, runs: Runs, selected: str, config: str | None) -> None:
    """Answer until a signal arrives. Prints the address of the page, which holds the token."""
    torch.set_num_threads(1)  # the cores belong to training
    listening, token = open_socket(port), secrets.token_urlsafe()
    port = listening.getsockname()[1]
    app = Starlette(routes=Pages(runs, selected, config).routes())
    for kind in (HTTPException, UserError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, explain)
    settings: Any = {"loop": "asyncio", "http": "h11", "ws": "none", "lifespan": "off", "proxy_headers": False}
    settings |= {"log_config": None, "log_level": "critical", "access_log": False, "server_header": False}
    print(f"http://127.0.0.1:{port}/?token={token}", flush=True)
    Server(uvicorn.Config(Guard(app, port, token), **settings)).run([listening])

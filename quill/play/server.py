"""The page's server: who may ask, for what, and how an answer is sent. views.py and runs.py make the answers.

It listens to 127.0.0.1 only. The Host must be its own: otherwise another site could let its name point to 127.0.0.1
(DNS rebinding). A request needs the token of the printed address, so that neither another page in the browser nor
another user of the machine can ask. Nothing that the page sends is used as a path.

One request computes at a time, and beside it one looks after the runs, so that a long sample delays no curve.
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
from quill.play.contents import read_contents, write_config
from quill.play.fields import Fields, parse, read
from quill.play.runs import Runs, UnknownRun
from quill.play.views import Views

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
LIMIT, LIMIT_WITH_TEXT = 2**16, 2**22  # bytes of a request
LOOK, ALIVE = 0.25, 10.0  # seconds between looks at a run, and between signs of life in a stream


def make_server(listening: socket.socket, runs: Runs, selected: str, config: str | None) -> tuple[Server, str]:
    """Make the server of a socket. → the server, and the address of the page, which holds the token

    selected, config: the run and the config that the page opens with.
    """
    torch.set_num_threads(1)  # the other cores belong to training
    port, token = listening.getsockname()[1], secrets.token_urlsafe()
    app = Starlette(routes=Pages(runs, selected, config).routes())
    app.router.redirect_slashes = False
    for kind in (HTTPException, UserError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, explain)
    settings: Any = {"loop": "asyncio", "http": "h11", "ws": "none", "lifespan": "off", "proxy_headers": False}
    settings |= {"log_config": None, "log_level": "critical", "access_log": False, "server_header": False}
    guard = Guard(app, {f"127.0.0.1:{port}", f"localhost:{port}"}, token)
    return Server(uvicorn.Config(guard, **settings)), f"http://127.0.0.1:{port}/?token={token}"


class Server(uvicorn.Server):
    """A server that a signal ends at once, although pages listen to events. It has nothing to save."""

    def handle_exit(self, sig: int, frame: Any) -> None:  # noqa: D102
        os._exit(128 + sig)


class Guard:
    """Refuse requests that are not the page's own, and add HEADERS to every answer."""

    def __init__(self, app: Callable, hosts: set[str], token: str):
        self.app, self.hosts, self.token = app, hosts, token.encode()

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:  # noqa: D102
        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = message | {"headers": [*message["headers"], *added]}
            await send(message)

        problem, app = self.problem(Request(scope)), self.app
        if problem:
            app = PlainTextResponse(problem + "\n", 403) if scope["path"] == "/" else refusal(403, problem)
        await app(scope, receive, send_with_headers)

    def problem(self, request: Request) -> str:
        """Return why a request is refused; "" if it is not."""
        headers, path = request.headers, request.url.path
        hosts = [host if ":" in host else f"{host}:80" for host in headers.getlist("host")]
        if len(hosts) != 1 or hosts[0] not in self.hosts:
            return "this server answers to 127.0.0.1 and localhost only"
        if any(origin.removeprefix("http://") not in self.hosts for origin in headers.getlist("origin")):
            return "this server answers its own page only"
        token = headers.get("x-quill-token") or request.query_params.get("token", "")
        if path.startswith("/static/") or secrets.compare_digest(token.encode(errors="replace"), self.token):
            return ""
        return "the token is missing or old: open the address that play.py has printed"


class Pages:
    """The server's addresses."""

    def __init__(self, runs: Runs, selected: str, config: str | None):
        self.runs, self.views, self.opened_with = runs, Views(runs), {"selected": selected, "selected_config": config}
        self.contents: dict[str, Any] = {}
        self.computing, self.looking = asyncio.Lock(), asyncio.Lock()
        self.files = {path.relative_to(STATIC).as_posix(): path for path in STATIC.rglob("*") if path.is_file()}

    def routes(self) -> list[Route]:
        """Return the routes. Those of GET read their fields from the address, those of POST from JSON."""
        get = {"setup": self.setup, "runs": lambda _: {"runs": self.runs.list()}, "run": self.run}
        post = {"start": self.start, "control": self.control}
        compute_get = {"network": self.views.network, "matrix": self.views.matrix}
        compute_post = {"token": self.views.token, "score": self.views.score, "samples": self.views.samples}
        routes = [Route(path, self.file) for path in ("/", "/static/{name:path}")]
        routes += [Route("/api/events", self.events), Route("/api/config", self.config)]
        for method, lock, functions in (
            ("GET", self.looking, get),
            ("POST", self.looking, post),
            ("GET", self.computing, compute_get),
            ("POST", self.computing, compute_post),
        ):
            routes += [answer(method, name, function, lock) for name, function in functions.items()]
        return routes

    async def file(self, request: Request) -> Response:
        """Send a file that was in STATIC when the server started."""
        path = self.files.get(request.path_params.get("name", "index.html"))
        if path is None:
            raise HTTPException(404, "there is no such file")
        return FileResponse(path, media_type=TYPES.get(path.suffix, "text/plain"))

    def setup(self, asked: Fields) -> dict[str, Any]:
        """Return what the page reads first."""
        self.contents = self.contents or read_contents()
        return self.contents | self.opened_with | {"datasets": self.runs.datasets()}

    def run(self, asked: Fields) -> dict[str, Any]:
        """Return the run object."""
        return self.runs.run(asked.name)

    def start(self, asked: Fields) -> dict[str, Any]:
        """Start a run. → its run object"""
        name = self.runs.start(asked.config, asked.run, asked.options, asked.text, asked.documents, asked.paused)
        return self.runs.run(name)

    def control(self, asked: Fields) -> dict[str, Any]:
        """Let a run train, pause or take one step. → its run object"""
        self.runs.control(asked.name, asked.action)
        return self.runs.run(asked.name)

    async def config(self, request: Request) -> Response:
        """Send a config file that trains a run again."""
        run = await work(self.looking, self.run, read_query(request))
        return PlainTextResponse(write_config(run["name"], run["options"]))

    async def events(self, request: Request) -> Response:
        """Send the run object now, and whenever it has changed, as Server-Sent Events."""
        name = read_query(request).name
        await work(self.looking, self.runs.signature, name)  # raises UnknownRun before the answer begins
        events = self.changes(name) if request.method == "GET" else ()
        return StreamingResponse(events, media_type="text/event-stream")

    async def changes(self, name: str) -> AsyncIterator[str]:
        """Yield events, until the run is deleted or the reader goes away."""
        last, quiet = None, 0.0
        while True:
            try:
                signature = await work(self.looking, self.runs.signature, name)
                run = None if (signature,) == last else await work(self.looking, self.runs.run, name)
            except UserError:
                return
            if run is not None or quiet >= ALIVE:
                yield ": alive\n\n" if run is None else f"data: {to_json(run)}\n\n"
                last, quiet = (signature,), 0.0
            await asyncio.sleep(LOOK)
            quiet += LOOK


def answer(method: str, name: str, function: Callable[[Fields], Any], lock: asyncio.Lock) -> Route:
    """Make the route /api/`name`, which calls `function` with the fields of a request, and sends its JSON."""

    async def endpoint(request: Request) -> Response:
        if method == "GET":
            asked = read_query(request)
        else:
            asked = read(parse(await read_body(request, LIMIT_WITH_TEXT if name == "start" else LIMIT)))
        return Response(to_json(await work(lock, function, asked)), media_type="application/json")

    return Route(f"/api/{name}", endpoint, methods=[method])


async def work(lock: asyncio.Lock, function: Callable, *args: Any) -> Any:
    """Call a function in another thread, when the calls before it that hold `lock` are done."""
    async with lock:
        return await asyncio.to_thread(function, *args)


def read_query(request: Request) -> Fields:
    """Read the fields of a GET."""
    return read({key: value for key, value in request.query_params.items() if key != "token"})


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body of a POST of JSON. Raise an HTTPException if it is too long or of another type."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the request must be application/json")
    body, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            body += part
        elif size > 16 * limit:  # until then it is read, because a browser sees no answer before it has sent all
            break
    if size > limit:
        raise HTTPException(413, f"the request is longer than {limit // 1024:,} KiB")
    return bytes(body)


def to_json(values: Any) -> str:
    """Make JSON of `values`, in ASCII. A number that is not finite becomes null."""
    try:
        return json.dumps(values, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(values), parse_constant=lambda name: None))


def refusal(status: int, text: str) -> Response:
    """Make an answer with one line that says what is wrong."""
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    text = to_json({"error": line if len(line) <= 500 else f"{line[:499]}…"})
    return Response(text, status, media_type="application/json")


def explain(request: Request, error: Exception) -> Response:
    """Turn an exception into an answer. Of a bug of ours, the traceback is printed."""
    if isinstance(error, HTTPException):
        return refusal(error.status_code, error.detail)
    if isinstance(error, (UserError, ClientDisconnect)):
        return refusal(404 if isinstance(error, UnknownRun) else 400, str(error))
    traceback.print_exception(error, file=sys.stderr)
    return refusal(500, f"a bug in quill ({type(error).__name__}): see the terminal")

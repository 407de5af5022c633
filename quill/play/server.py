"""The page's server: who may ask, for what, and how an answer is sent. views.py and runs.py make the answers.

It listens to 127.0.0.1 only. The Host must be its own: otherwise another site could let its name point to 127.0.0.1
(DNS rebinding). A request needs the token of the printed address, so that neither another page in the browser nor
another user of the machine can ask. Nothing that the page sends is used as a path.

One request computes at a time, and beside it one looks after the runs, so that a long sample delays no curve.
"""

import asyncio
import itertools
import json
import os
import secrets
import socket
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from quill.cli import one_line
from quill.errors import UserError
from quill.play.contents import read_contents, write_config
from quill.play.runs import Runs, UnknownRun
from quill.play.views import Fields, Views, read_fields

HEADERS = {  # of every answer
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",  # no other site can find out by a script that quill runs
    "cache-control": "no-store",
}
STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
LIMIT, LIMIT_WITH_TEXT = 2**16, 2**22  # bytes of a request


def make_server(listening: socket.socket, runs: Runs, selected: str, config: str | None) -> tuple[uvicorn.Server, str]:
    """Make the server of a socket. → the server, and the address of the page, which holds the token

    selected, config: the run and the config that the page opens with.
    """
    torch.set_num_threads(1)  # the other cores belong to training
    port, token = listening.getsockname()[1], secrets.token_urlsafe()
    hosts = {f"{host}:{port}".removesuffix(":80") for host in ("127.0.0.1", "localhost")}
    routes = make_routes(runs, {"selected": selected, "selected_config": config})
    handlers = dict.fromkeys((HTTPException, UserError, ClientDisconnect, Exception), explain)
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    settings: Any = {"http": "h11", "ws": "none", "lifespan": "off", "log_config": None, "log_level": "critical"}
    settings |= {"headers": list(HEADERS.items()), "server_header": False}
    server = uvicorn.Server(uvicorn.Config(guard(app, hosts, token), **settings))
    server.handle_exit = lambda sig, frame: os._exit(128 + sig)  # at once, although pages listen to events
    return server, f"http://127.0.0.1:{port}/?token={token}"


def guard(app: Callable, hosts: set[str], token: str) -> Callable:
    """Return `app`, which only the page can ask: from its own address, and with the token unless for a static file."""

    async def guarded(scope: Any, receive: Callable, send: Callable) -> None:
        request, problem = Request(scope), ""
        host, given = request.headers.get("host", ""), request.headers.get("x-quill-token")
        given = (given or request.query_params.get("token", "")).encode()
        if host not in hosts or request.headers.get("origin", host).removeprefix("http://") not in hosts:
            problem = "this server answers its own page, at 127.0.0.1 and localhost only"
        elif not request.url.path.startswith("/static/") and not secrets.compare_digest(given, token.encode()):
            problem = "the token is missing or old: open the address that play.py has printed"
        refusal = PlainTextResponse(f"{problem}\n", 403) if request.url.path == "/" else refuse(403, problem)
        await (refusal if problem else app)(scope, receive, send)

    return guarded


def make_routes(runs: Runs, opened_with: dict[str, Any]) -> list[Route]:
    """Return the server's addresses. Of each of the two kinds, one request at a time is worked on."""
    looking, computing, views = asyncio.Lock(), asyncio.Lock(), Views(runs)
    files = {path.relative_to(STATIC).as_posix(): path for path in STATIC.rglob("*") if path.is_file()}

    async def file(request: Request) -> Response:
        path = files.get(request.path_params.get("name", "index.html"))
        if path is None:
            raise HTTPException(404, "there is no such file")
        return FileResponse(path, media_type=TYPES.get(path.suffix, "text/plain"))

    async def events(request: Request) -> Response:
        name = (await read_request(request)).name
        await work(looking, runs.signature, name)  # raises UnknownRun before the answer begins
        changes = watch(runs, name, looking) if request.method == "GET" else ()
        return StreamingResponse(changes, media_type="text/event-stream")

    def start(asked: Fields) -> dict[str, Any]:
        name = runs.start(asked.config, asked.run, asked.options, asked.text, asked.documents, asked.paused)
        return runs.run(name)

    def control(asked: Fields) -> dict[str, Any]:
        runs.control(asked.name, asked.action)
        return runs.run(asked.name)

    return [
        Route("/", file),
        Route("/static/{name:path}", file),
        Route("/api/events", events),
        answer("GET", "setup", looking, lambda _: read_contents() | opened_with | {"datasets": runs.datasets()}),
        answer("GET", "runs", looking, lambda _: {"runs": runs.summaries()}),
        answer("GET", "run", looking, lambda asked: runs.run(asked.name)),
        answer("GET", "config", looking, lambda asked: write_config(asked.name, runs.run(asked.name)["options"])),
        answer("POST", "start", looking, start),
        answer("POST", "control", looking, control),
        answer("GET", "network", computing, views.network),
        answer("GET", "matrix", computing, views.matrix),
        answer("POST", "token", computing, views.token),
        answer("POST", "score", computing, views.score),
        answer("POST", "samples", computing, views.samples),
    ]


async def watch(runs: Runs, name: str, lock: asyncio.Lock) -> AsyncIterator[str]:
    """Yield the run object now, and whenever it has changed, as Server-Sent Events."""
    last = None
    with suppress(UserError):  # the run was deleted
        for look in itertools.count():  # four times a second
            signature = await work(lock, runs.signature, name)
            if signature != last:
                yield f"data: {to_json(await work(lock, runs.run, name))}\n\n"
            elif look % 40 == 0:
                yield ": alive\n\n"
            last = signature
            await asyncio.sleep(0.25)


def answer(method: str, name: str, lock: asyncio.Lock, function: Callable[[Fields], Any]) -> Route:
    """Make the route /api/`name`, which answers with what `function` makes of the fields: a text, or values as JSON."""

    async def endpoint(request: Request) -> Response:
        values = await work(lock, function, await read_request(request))
        if isinstance(values, str):
            return PlainTextResponse(values)
        return Response(to_json(values), media_type="application/json")

    return Route(f"/api/{name}", endpoint, methods=[method])


async def work(lock: asyncio.Lock, function: Callable, *args: Any) -> Any:
    """Call a function in another thread, when the calls before it that hold `lock` are done."""
    async with lock:
        return await asyncio.to_thread(function, *args)


async def read_request(request: Request) -> Fields:
    """Read the fields of a request: of a GET from the address, of a POST from its JSON."""
    if request.method != "POST":
        return read_fields({key: value for key, value in request.query_params.items() if key != "token"})
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the request must be application/json")
    body, limit = b"", LIMIT_WITH_TEXT if request.url.path == "/api/start" else LIMIT
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise HTTPException(413, f"the request is longer than {limit // 1024:,} KiB")
    try:
        values = json.loads(body, parse_constant=int)  # int fails for NaN and Infinity, which JSON does not have
    except (ValueError, RecursionError):
        raise UserError("the request is not JSON") from None
    return read_fields(values)


def to_json(values: Any) -> str:
    """Make JSON of `values`. A number that is not finite becomes null."""
    return json.dumps(json.loads(json.dumps(values), parse_constant=lambda _: None))


def refuse(status: int, text: str) -> Response:
    """Make an answer with one line that says what is wrong."""
    return Response(to_json({"error": one_line(text)[:500]}), status, media_type="application/json")


def explain(request: Request, error: Exception) -> Response:
    """Turn an exception into an answer. Of a bug of ours, the traceback is printed."""
    if isinstance(error, HTTPException):
        return refuse(error.status_code, error.detail)
    if isinstance(error, (UserError, ClientDisconnect)):
        return refuse(404 if isinstance(error, UnknownRun) else 400, str(error))
    traceback.print_exception(error)
    return refuse(500, f"a bug in quill ({type(error).__name__}): see the terminal")

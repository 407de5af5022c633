"""The page's server over real HTTP: its numbers are the terminal's, and whoever is not the page is refused."""

import http.client
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import get_args, get_origin
from urllib.parse import quote

import pytest
import torch

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import play
import quill.play.views as views
import sample
from model import GPT
from quill import checkpoint
from quill.cli import option_types, read_config_file
from quill.data.batches import Batches
from quill.data.corpora import CORPORA
from quill.data.token_files import open_dataset, prepare_corpus
from quill.data.tokenizers import ByteTokenizer, CharTokenizer, from_json
from quill.errors import UserError
from quill.options import TrainConfig
from quill.play.contents import write_config
from quill.play.runs import BUNDLED, Runs
from quill.play.server import HEADERS, LIMIT, STATIC, make_server
from quill.play.views import Fields
from quill.trace import attention_steps, trace

ROOT = Path(__file__).parent.parent
FLAGS = ["--device=cpu", "--dtype=float32", "--threads=1"]
NOT_FINITE = [math.nan, math.inf, -math.inf]


class Page:
    """A server in a thread, and a client that asks it as the page does."""

    def __init__(self, folder):
        self.folder = folder
        self.listening = play.open_socket(0)
        self.port = self.listening.getsockname()[1]
        self.runs = Runs(folder / "out", folder / "data")
        self.server, self.address = make_server(self.listening, self.runs, "bundled", "config/names.py")
        self.token = self.address.partition("token=")[2]
        self.thread = threading.Thread(target=self.server.run, args=([self.listening],))

    def ask(self, path, body=None, method=None, headers=None):
        """→ the status, the headers, the body. Bytes are sent as they are, other bodies as JSON."""
        own = {"X-Quill-Token": self.token, "Content-Type": "application/json"}
        headers = {key: value for key, value in (own | (headers or {})).items() if value is not None}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method or ("GET" if data is None else "POST"), path, data, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def get(self, path, body=None):
        """→ the values of an answer that must be right."""
        status, headers, data = self.ask(path, body)
        assert (status, headers["content-type"]) == (200, "application/json"), data
        return json.loads(data, parse_constant=pytest.fail)

    def refused(self, path, body=None, **options):
        """→ the status and the one line of an answer that must be an error."""
        status, _, data = self.ask(path, body, **options)
        (line,) = json.loads(data).values()
        assert status >= 400 and line.isprintable() and line
        return status, line


def save_run(folder, config, tokenizer, **more):
    """Write a run's best.pt with random weights of `config`. → the model"""
    torch.manual_seed(0)
    options = TrainConfig(**config)
    model = GPT(options, tokenizer.vocab_size)
    state = {"config": asdict(options), "vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.to_json()}
    state |= {"model": model.state_dict(), "ema": None, "step": 3, "best_val_loss": 3.0}
    checkpoint.save(folder / "best.pt", state | more)
    return model


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A server with the bundled model, `wide` (bytes, biases, tied, gradients) and `flat` (a bigram model)."""
    folder = tmp_path_factory.mktemp("page")
    prepare_corpus(CORPORA["names"], folder / "data")
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 96, "block_size": 70, "bias": True, "init_std": 0.1}
    byte = ByteTokenizer()
    gradients = {"transformer.wte.weight": torch.full((256, 96), 2.0)}
    save_run(folder / "out" / "wide", shape | {"dataset": "prose"}, byte, gradients=gradients)
    flat = {"n_layer": 0, "n_head": 1, "n_embd": 8, "position": "none", "mlp_ratio": 0.0, "tie_weights": False}
    save_run(folder / "out" / "flat", flat, CharTokenizer("\nab"))
    page = Page(folder)
    page.thread.start()
    yield page
    page.server.should_exit = True
    page.thread.join(10)
    assert not page.thread.is_alive()


def bundled():
    state = checkpoint.load(BUNDLED)
    return checkpoint.load_model(state).eval(), from_json(state["tokenizer"])


# ---------------------------------------------------------------- the bundled model


def test_the_bundled_model(page):
    """It was written, in 50 s of CPU time, by

    OMP_NUM_THREADS=1 python train.py config/microgpt.py --dataset=names --batch_size=32 --max_iters=10000
        --dtype=float32 --out_dir=out/bundled    # then best.pt was copied
    """
    assert BUNDLED.stat().st_size < 100_000
    model, tokenizer = bundled()
    assert model.num_params() == 4192
    data = open_dataset(page.folder / "data", "names")
    assert tokenizer == data.tokenizer
    batches = Batches(data.val, tokenizer.bos, 16, rows=32, micro_rows=32, seed=0, device=torch.device("cpu"))
    total = count = 0.0
    with torch.no_grad():
        for x, y, predicted in batches.validation():
            total, count = total + model(x, y)[1].item() * predicted, count + predicted
    recorded = checkpoint.load(BUNDLED)["best_val_loss"]
    assert total / count == pytest.approx(recorded, rel=1e-3)
    assert recorded < 2.36


# ---------------------------------------------------------------- the terminal's numbers


def printed(capsys, *flags):
    capsys.readouterr()
    sample.main([f"--ckpt={BUNDLED}", *FLAGS, *flags])
    return capsys.readouterr().out


@pytest.mark.parametrize("text", ["anna", "anna\nbob", "qxz", "none"])
def test_a_score_is_the_terminals(page, capsys, text):
    terminal = json.loads(printed(capsys, f"--score={text}", "--json"))
    own = page.get("/api/score", {"text": text})
    for row in own["rows"]:
        assert sum(choice["probability"] for choice in row["likeliest"]) == pytest.approx(1, abs=1e-5)
        assert len(row["likeliest"]) == 27
        row["likeliest"] = row["likeliest"][:5]
    assert own == terminal


@pytest.mark.parametrize(
    "drawing", [{}, {"temperature": 0.5, "top_k": 3}, {"temperature": 2, "top_p": 0.4}, {"top_k": 5, "top_p": 0.9}]
)
@pytest.mark.parametrize("text", ["", "ann", "maximiliana-longer"[:11] * 2])
def test_a_token_is_the_terminals(page, text, drawing):
    model, tokenizer = bundled()
    idx = torch.from_numpy(tokenizer.prompt(text)).long()[None]
    path = trace(model, idx, torch.Generator().manual_seed(1), **drawing)
    own = page.get("/api/token", {"text": text, "head": 2} | drawing)
    assert own["ids"] == path.ids
    assert own["vectors"] == {name: pytest.approx(vector, abs=1e-5) for name, vector in path.vectors.items()}
    choices = {choice["id"]: choice for choice in own["choices"]}
    assert [choices[i]["logit"] for i in range(27)] == pytest.approx(path.logits, abs=1e-5)
    assert [choices[i]["probability"] for i in range(27)] == pytest.approx(path.probs, abs=1e-6)
    ranked = [choice["logit"] for choice in own["choices"]]
    assert ranked == sorted(ranked, reverse=True)
    assert own["choices"][-1]["sum"] == pytest.approx(1, abs=1e-5)
    scaled = own["choices"][0]["scaled"] * drawing.get("temperature", 1)
    assert scaled == pytest.approx(ranked[0])
    (steps,) = attention_steps(model, idx[:, -16:])
    for name, matrix in own["attention"].items():
        expected = [
            [None if x == -math.inf else pytest.approx(x, abs=1e-5) for x in row] for row in steps[name][2].tolist()
        ]
        assert matrix == expected
    assert set(own["attention"]) == {"q kᵀ", "q kᵀ / √D", "with the mask", "softmax"}


def test_the_temperature_0_takes_the_likeliest(page):
    first, *others = page.get("/api/token", {"text": "ann", "temperature": 0})["choices"]
    assert (first["probability"], first["scaled"], first["sum"]) == (1, None, 1)
    assert {choice["probability"] for choice in others} == {0}
    texts = page.get("/api/samples", {"temperature": 0, "count": 3})["texts"]
    assert len({text["text"] for text in texts}) == 1


def test_a_new_temperature_needs_no_forward_pass(page, monkeypatch):
    calls = []
    monkeypatch.setattr(views, "trace", lambda *args: calls.append(args) or trace(*args))
    answers = [page.get("/api/token", {"text": "once", "temperature": t}) for t in (1.0, 0.5, 2.0)]
    assert len(calls) == 1
    tops = [answer["choices"][0]["probability"] for answer in answers]
    assert tops[1] > tops[0] > tops[2]


@pytest.mark.parametrize(
    "drawing", [{"temperature": 0.5, "top_k": None, "seed": 7}, {"prompt": "ma", "top_k": 4, "top_p": 0.8}]
)
def test_samples_are_the_terminals(page, capsys, drawing):
    asked = {"count": 12, "max_new_tokens": 40, "temperature": 0.9} | drawing
    flags = {"num_samples": asked["count"], "start": asked.get("prompt", "")} | asked
    keys = ("num_samples", "start", "max_new_tokens", "temperature", "top_k", "top_p", "seed")
    lines = printed(capsys, *(f"--{key}={'' if flags[key] is None else flags[key]}" for key in keys if key in flags))
    texts = page.get("/api/samples", asked)["texts"]
    assert [text["text"] for text in texts] == lines.splitlines()
    known = set((ROOT / "data" / "names.txt").read_text(encoding="utf-8").split())
    assert [text["is_new"] for text in texts] == [text["text"] not in known for text in texts]
    assert all(text["text"].isalpha() and text["text"].isascii() for text in texts)


# ---------------------------------------------------------------- the other panels


def test_the_parts_of_a_network_are_all_its_parameters(page):
    for name in ("bundled", "wide", "flat"):
        state = checkpoint.load(page.runs.weights(name))
        model = checkpoint.load_model(state)
        parts = page.get(f"/api/network?name={name}")["parts"]
        matrices = {part["matrix"]: part["shape"] for part in parts if part["matrix"] and not part["tied"]}
        assert matrices == {key: list(value.shape) for key, value in model.named_parameters()}
        assert (
            sum(part["parameters"] for part in parts if part["depth"] == 0 and not part["tied"]) == model.num_params()
        )
    (head,) = [part for part in page.get("/api/network?name=wide")["parts"] if part["name"] == "lm_head"]
    assert head["tied"] and head["matrix"] == "transformer.wte.weight"
    (part,) = [part for part in page.get("/api/network")["parts"] if part["name"] == "transformer.h.0.attn.c_attn"]
    expected = {"kind": "Linear", "shape": [48, 16], "parameters": 768, "depth": 3, "tied": False}
    assert part == expected | {"name": part["name"], "matrix": part["name"] + ".weight"}


def test_a_matrix(page):
    model, tokenizer = bundled()
    weight = model.lm_head.weight.detach()
    own = page.get("/api/matrix?matrix=lm_head.weight")
    assert own["values"] == weight.tolist()
    assert (own["shape"], own["shrunk"], own["gradient"]) == ([27, 16], False, None)
    assert own["row_names"][:2] + own["row_names"][26:] == ["a", "b", "<end>"]
    assert sum(own["histogram"]["counts"]) == 27 * 16
    assert len(own["histogram"]["edges"]) == 41
    assert own["histogram"]["edges"][-1] == pytest.approx(weight.max().item())
    assert own["std"] == pytest.approx(weight.std(correction=0).item())
    assert own["largest"] == pytest.approx(weight.abs().max().item())


def test_a_large_matrix_is_shown_as_means(page):
    own = page.get("/api/matrix?name=wide&matrix=transformer.wte.weight")
    weight = checkpoint.load(page.runs.weights("wide"))["model"]["transformer.wte.weight"]
    assert own["shrunk"] and (len(own["values"]), len(own["values"][0])) == (64, 64)
    assert own["values"][0][0] == pytest.approx(
        weight[:4, :2].mean().item(), abs=1e-6
    )  # 256 / 64 rows, 96 / 64 columns
    assert own["row_names"] is None
    assert own["gradient"] == [[2.0] * 64] * 64
    assert sum(own["gradient_histogram"]["counts"]) == 256 * 96
    bias = page.get("/api/matrix?name=wide&matrix=transformer.h.1.attn.c_attn.bias")
    assert (bias["values"], bias["std"]) == ([[0.0] * 64], 0)


def test_other_kinds_of_models(page):
    own = page.get("/api/token", {"name": "flat", "text": "ab"})
    assert (own["attention"], own["n_layer"], len(own["choices"])) == (None, 0, 3)
    own = page.get("/api/token", {"name": "wide", "text": "x" * 200, "layer": 1, "head": 1})
    assert [len(own[key]) for key in ("ids", "tokens", "choices")] == [64, 64, 256]
    assert [len(row) for row in own["attention"]["softmax"]] == [64] * 64
    assert page.get("/api/token", {"name": "wide", "text": ""})["ids"] == [10]  # a newline
    texts = page.get("/api/samples", {"name": "wide", "prompt": "é\n", "count": 2, "max_new_tokens": 8})["texts"]
    assert all(text["text"].startswith("é\n") and text["is_new"] is None for text in texts)


def test_weights_that_were_replaced_are_read_again(page):
    save_run(page.folder / "out" / "again", {"n_embd": 16, "n_head": 1, "n_layer": 1}, bundled()[1])
    before = page.get("/api/score", {"name": "again", "text": "anna"})
    shutil.copy(BUNDLED, page.folder / "out" / "again" / "best.pt")
    assert (
        page.get("/api/score", {"name": "again", "text": "anna"}) == page.get("/api/score", {"text": "anna"}) != before
    )


def test_weights_that_have_diverged(page):
    """Finite weights may give other logits; NaN weights are refused by checkpoint.load."""
    config, folder = {"n_embd": 16, "n_head": 1, "n_layer": 1, "norm_final": False}, page.folder / "out" / "diverged"
    model = save_run(folder, config, bundled()[1])
    weights = {key: torch.full_like(value, 3e38) for key, value in model.state_dict().items()}
    gradients = {"transformer.wpe.weight": torch.full((1024, 16), math.nan)}
    save_run(folder, config, bundled()[1], model=weights, gradients=gradients)
    own = page.get("/api/matrix?name=diverged&matrix=transformer.wpe.weight")
    assert (own["mean"], own["largest"], sum(own["histogram"]["counts"])) == (None, pytest.approx(3e38), 1024 * 16)
    assert own["gradient"] == [[None] * 16] * 64
    for address, fields in (("token", {"text": "a"}), ("score", {"text": "a"}), ("samples", {})):
        status, line = page.refused(f"/api/{address}", {"name": "diverged"} | fields)
        assert status == 400
        assert "not finite" in line


def test_the_setup_is_the_repositorys(page):
    own = page.get("/api/setup")
    assert (own["selected"], own["selected_config"], own["datasets"][0]) == (
        "bundled",
        "config/names.py",
        "shakespeare_char",
    )
    assert {config["name"] for config in own["configs"]} >= {"config/names.py", "config/gpt3/small.py"}
    config = next(config for config in own["configs"] if config["name"] == "config/microgpt.py")
    assert config["options"] == asdict(TrainConfig(**read_config_file("config/microgpt.py", TrainConfig)))
    assert [lesson["number"] for lesson in own["lessons"]] == [*range(9)]
    assert own["lessons"][0] == {
        "number": 0,
        "config": "config/ladder/0_bigram.py",
        "title": "a bigram model",
        "text": "It predicts the next character from the last one alone.\n\nA table has a vector for each character. "
        "A linear layer turns the vector into the logits of the next character.",
        "measured_loss": 2.483,
    }
    losses = [lesson["measured_loss"] for lesson in own["lessons"]]
    assert losses[:8] == sorted(losses[:8], reverse=True)
    assert {dial["name"]: dial["kind"] for dial in own["dials"]}.items() >= {
        "n_layer": "int",
        "dropout": "float",
    }.items()
    (optimizer,) = [dial for dial in own["dials"] if dial["name"] == "optimizer"]
    assert (optimizer["kind"], optimizer["choices"]) == ("choice", ["adamw", "muon"])
    for code in own["code"].values():
        lines = (ROOT / code["file"]).read_text(encoding="utf-8").splitlines()
        first = code["source"].splitlines()[0]
        assert lines[code["line"] - 1].strip() == first
        assert first.startswith(f"def {code['name'].rpartition('.')[2]}(")
    assert own["code"]["CausalSelfAttention.attend"]["name"] == "CausalSelfAttention.attend"


def test_an_exported_config_trains_the_same_run(page, tmp_path):
    options = page.get("/api/run")["options"]
    status, headers, data = page.ask("/api/config")
    assert (status, headers["content-type"]) == (200, "text/plain; charset=utf-8")
    (tmp_path / "own.py").write_bytes(data)
    again = asdict(TrainConfig(**read_config_file(tmp_path / "own.py", TrainConfig)))
    assert again | {"out_dir": ""} == options | {"out_dir": ""}
    hostile = write_config('a"""\nimport os\\', options | {"dataset": 'a\'\n"""b'})
    (tmp_path / "hostile.py").write_text(hostile, encoding="utf-8")
    assert read_config_file(tmp_path / "hostile.py", TrainConfig)["dataset"] == 'a\'\n"""b'


# ---------------------------------------------------------------- events, several requests


def open_events(page, name="bundled"):
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=10)
    connection.request("GET", f"/api/events?name={name}&token={page.token}")
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("content-type")) == (200, "text/event-stream; charset=utf-8")
    return connection, answer


def next_event(answer):
    while True:
        line = answer.readline().decode()
        if line.startswith("data: "):
            return json.loads(line.removeprefix("data: "))


def test_events(page):
    folder = page.folder / "out" / "wide"
    connection, answer = open_events(page, "wide")
    try:
        assert next_event(answer) == page.get("/api/run?name=wide")
        (folder / "metrics.csv").write_text("step,train_loss,val_loss,tokens_per_s,seconds\n3,2.5,2.25,10,1\n")
        began = time.monotonic()
        assert next_event(answer)["evaluations"][0]["val_loss"] == 2.25
        assert time.monotonic() - began < 5
    finally:
        connection.close()


def test_a_reader_that_goes_away_ends_its_events(page, monkeypatch):
    asked = []
    signature = page.runs.signature
    monkeypatch.setattr(page.runs, "signature", lambda name: asked.append(name) or signature(name))
    connection, answer = open_events(page, "flat")
    next_event(answer)
    answer.close()
    connection.close()
    end = time.monotonic() + 5
    while time.monotonic() < end:
        asked.clear()
        time.sleep(0.6)
        if not asked:
            break
    assert not asked


def test_a_head_request_of_events_ends_at_once(page):
    for path in ("/api/events", "/api/run", "/", "/static/none.js"):
        status, headers, data = page.ask(path, method="HEAD")
        assert data == b""
        assert status in (200, 404)
        assert headers["cache-control"] == "no-store"


def test_requests_at_once_get_their_own_answers(page):
    texts = ["anna", "bob", "carla", "dora", "emil", "franz", "gina", "hugo"]
    alone = [page.get("/api/score", {"text": text}) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: page.get("/api/score", {"text": text}), texts)) == alone
        drawn = list(pool.map(lambda _: page.get("/api/samples", {"count": 5}), range(6)))
    assert all(samples == drawn[0] for samples in drawn)


# ---------------------------------------------------------------- who may ask


def test_it_listens_to_this_machine_only(page):
    assert page.listening.getsockname()[0] == "127.0.0.1"
    assert re.fullmatch(rf"http://127\.0\.0\.1:{page.port}/\?token=[\w-]{{43}}", page.address)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "0.0.0.0:{port}", ""]
)
def test_a_foreign_host_is_refused(page, host):
    """A site whose name points to 127.0.0.1 sends its own name."""
    for path in ("/api/runs", f"/?token={page.token}", "/static/main.js"):
        status, headers, data = page.ask(path, headers={"Host": host.format(port=page.port)})
        assert status == 403
        assert b"localhost only" in data
        assert headers["content-security-policy"] == HEADERS["content-security-policy"]
    assert page.ask("/api/runs", headers={"Host": f"localhost:{page.port}"})[0] == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1", "https://127.0.0.1:{port}", ""])
def test_a_foreign_origin_is_refused(page, origin):
    headers = {"Origin": origin.format(port=page.port)}
    for path, body in (("/api/runs", None), ("/api/score", {"text": "a"}), (f"/?token={page.token}", None)):
        assert page.ask(path, body, headers=headers)[0] == 403
    headers = {"Origin": f"http://localhost:{page.port}"}
    assert page.ask("/api/score", {"text": "a"}, headers=headers)[0] == 200


@pytest.mark.parametrize("token", [None, "", "x", "é", "a" * 43])
def test_a_request_needs_the_token(page, token):
    headers = {"X-Quill-Token": None if token is None else token.encode()}
    addresses = [
        "/",
        "/api/setup",
        "/api/runs",
        "/api/run",
        "/api/events",
        "/api/network",
        "/api/matrix",
        "/api/config",
    ]
    posts = ["/api/start", "/api/control", "/api/token", "/api/score", "/api/samples"]
    for path in [*addresses, "/nowhere", "/statical"]:
        assert page.ask(path, headers=headers)[0] == 403, path
    for path in posts:
        assert page.ask(path, {}, headers=headers)[0] == 403, path
    status, headers, data = page.ask("/?token=wrong", headers=headers)
    assert (status, headers["content-type"]) == (403, "text/plain; charset=utf-8")
    assert data == b"the token is missing or old: open the address that play.py has printed\n"
    assert page.ask(f"/api/runs?token={page.token}", headers={"X-Quill-Token": None})[0] == 200


def test_every_answer_has_the_headers(page):
    addresses = [
        "/",
        "/static/x",
        "/api/run",
        "/api/run?name=x",
        "/nowhere",
        "/api/config",
        "/api/runs/",
        "//evil.example/",
    ]
    for path in addresses:
        status, headers, _ = page.ask(path)
        assert headers.items() >= HEADERS.items(), path
        assert "location" not in headers
        assert "server" not in headers
    assert "'unsafe" not in HEADERS["content-security-policy"]


@pytest.mark.parametrize(
    "name",
    [
        "../server.py",
        "..%2fserver.py",
        "%2e%2e/server.py",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "main.js%00",
        ".",
        "",
        "%ff",
    ],
)
def test_a_path_never_leaves_the_static_files(page, name):
    status, line = page.refused(f"/static/{name}")
    assert (status, line) == (404, "there is no such file")


def test_the_static_files_have_nothing_inline():
    for path in STATIC.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|https?://", text), path


HOSTILE_NAMES = ["", "..", "../..", "/etc", "out", "wide/..", "./wide", "wide/", "WIDE", "a\0b", "\ud800", "x" * 5000]
HOSTILE_NAMES += ["wide/page", "wide\\..", "bundled/", "%2e%2e", "none", "\u202e", "a\nb"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_are_not_found(page, name):
    for path, fields in (("token", {"text": "a"}), ("score", {"text": "a"}), ("samples", {}), ("control", {})):
        status, line = page.refused(f"/api/{path}", {"name": name} | fields)
        assert status == 404, line
        assert len(line) <= 500
    if "\0" not in name and "\ud800" not in name:
        for path in ("run", "network", "matrix", "events", "config"):
            assert page.refused(f"/api/{path}?name={quote(name)}")[0] == 404, path


@pytest.mark.parametrize(
    "matrix", ["", "lm_head", "__class__", "../lm_head.weight", "transformer.h.9.attn.c_attn.weight"]
)
def test_unknown_matrices_and_steps_are_not_found(page, matrix):
    assert page.refused(f"/api/matrix?matrix={matrix}")[0] == 404
    assert page.refused("/api/matrix?matrix=lm_head.weight&step=5")[0] == 404


# ---------------------------------------------------------------- wrong requests


def test_the_content_must_be_json(page):
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "",
        None,
        "application/jsonx",
    ):
        status, line = page.refused("/api/score", b'{"text": "a"}', headers={"Content-Type": kind})
        assert (status, line) == (415, "the request must be application/json")
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        assert page.ask("/api/score", {"text": "a"}, headers={"Content-Type": kind})[0] == 200


def test_long_requests_are_refused(page):
    body = json.dumps({"text": "a" * LIMIT}).encode()
    assert page.refused("/api/score", body) == (413, "the request is longer than 64 KiB")
    assert page.refused("/api/start", b"x" * (2**22 + 1)) == (413, "the request is longer than 4,096 KiB")
    assert page.get("/api/score", {"text": "a" * 2000})["tokens"] == 2001
    assert page.refused("/api/score", {"text": "a" * 2001}) == (400, "the text is longer than 2,000 characters")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[" * 60_000, b'{"a":' * 10_000, b'{"temperature": NaN}', b'{"top_p": -Infinity}']
)
def test_what_is_not_json(page, body):
    assert page.refused("/api/score", body) == (400, "the request is not JSON")


@pytest.mark.parametrize("body", [[], "text", 5, True, [{"text": "a"}]])
def test_what_is_not_an_object(page, body):
    assert page.refused("/api/score", body) == (400, "the request must be a JSON object")


WRONG = {str: [5, True, [], {}], int: ["x", 1.5, [], {}, True], float: ["x", [], {}, True], bool: ["x", 2, [], {}]}
WRONG |= {dict: ["x", 1, []], None: ["x", 5, []]}  # None: a Literal


@pytest.mark.parametrize("key", option_types(Fields))
def test_wrong_types_are_refused(page, key):
    kind = option_types(Fields)[key]
    kinds = {get_origin(kind)} if get_origin(kind) is dict else {kind, *get_args(kind)}
    (known,) = [kind for kind in WRONG if kind in kinds] or [None]
    for value in WRONG[known]:
        status, line = page.refused("/api/token", {key: value})
        assert status == 400
        assert key in line
    if known in (int, float) and key != "seed":  # any whole number is a seed
        for value in (2**1100, -(2**70), 1e308, "9" * 6000):
            assert page.refused("/api/token", {key: value})[0] == 400


@pytest.mark.parametrize(
    "path, fields, words",
    [
        ("token", {"temperature": -1}, "temperature"),
        ("token", {"top_p": 0}, "top_p=0.0: must be above 0"),
        ("token", {"top_p": 1.5}, "must be at most 1"),
        ("token", {"top_k": 0}, "must be at least 1"),
        ("token", {"layer": 1}, "layer 1, head 0: the model has 1 layers, 4 heads"),
        ("token", {"head": 4}, "the model has 1 layers, 4 heads"),
        ("token", {"layer": -1}, "must be at least 0"),
        ("token", {"text": "añna"}, "'ñ' (1 character that is not in the vocabulary)"),
        ("token", {"text": "\ud83d"}, "not in the vocabulary"),
        ("token", {"texts": "a"}, "there is no field 'texts' (did you mean text?)"),
        ("score", {"text": "\ud800"}, r"\ud800"),
        ("score", {"text": ""}, "there is no text to score"),
        ("score", {"text": "\n \n"}, "there is no text to score"),
        ("score", {}, "there is no text to score"),
        ("score", {"text": "\u200b"}, "not in the vocabulary"),
        ("score", {"name": "wide", "text": "\ud800"}, "not in the vocabulary"),
        ("samples", {"count": 21}, "must be at most 20"),
        ("samples", {"max_new_tokens": 501}, "must be at most 500"),
        ("samples", {"prompt": "ANNA"}, "not in the vocabulary"),
        ("samples", {"seed": -1}, "must be at least 0"),
        ("control", {"action": "stop"}, "action takes train or pause or step, not 'stop'"),
        ("start", {}, "config"),
        ("start", {"config": "../train.py"}, "no config"),
        ("start", {"config": "config/names.py", "options": {"out_dir": "/tmp/x"}}, "out_dir"),
        ("start", {"config": "config/names.py", "options": {"data_dir": "/tmp"}}, "data_dir"),
        ("start", {"config": "config/names.py", "options": {"init_from": "/etc/passwd"}}, "init_from"),
        ("start", {"config": "config/names.py", "options": {"dataset": "../x"}}, "dataset"),
        ("start", {"config": "config/names.py", "options": {"n_embd": 7}}, "n_embd=7 is not divisible"),
        ("start", {"config": "config/names.py", "options": {"n_layer": [1]}}, "n_layer"),
        ("start", {"config": "config/names.py", "options": {"--x": 1}}, "--x"),
        ("start", {"config": "config/names.py", "text": "a"}, "the text"),
    ],
)
def test_wrong_values_are_one_line(page, path, fields, words):
    before = sorted(str(path) for path in page.folder.rglob("*") if path.is_dir())
    status, line = page.refused(f"/api/{path}", fields)
    assert status == 400
    assert words in line
    assert sorted(str(path) for path in page.folder.rglob("*") if path.is_dir()) == before


def test_unknown_addresses_and_methods(page):
    assert page.refused("/api/nowhere")[0] == 404
    assert page.refused("/api/score")[0] == 405
    assert page.refused("/api/runs", {})[0] == 405
    assert page.refused("/api/run?nme=x") == (400, "there is no field 'nme' (did you mean name?)")


def test_a_bug_is_an_answer_too(page, monkeypatch, capsys):
    monkeypatch.setattr(page.runs, "summaries", lambda: 1 / 0)
    assert page.refused("/api/runs") == (500, "a bug in quill (ZeroDivisionError): see the terminal")
    assert "ZeroDivisionError" in capsys.readouterr().err


# ---------------------------------------------------------------- the script


def test_a_port_that_is_taken(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port={port}: Address already in use; --port=\d+ is free") as error:
            play.main([f"--port={port}"])
        free = int(re.search(r"port=(\d+) is", str(error.value))[1])
        play.open_socket(free).close()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["config/nmes.py"], "config/nmes.py: not one of the configs in config/ (did you mean config/names.py?)"),
        (["config/names.py", "config/microgpt.py"], "one config"),
        (["config/names.py", "--out_dir=out"], "one config"),
        (["--port=65536"], "--port=65536: must be below 65536"),
        (["--port=-1"], "must be at least 0"),
        (["--prot=1"], "no option prot (did you mean port?)"),
        (["--out_dir=nowhere", "--port=0"], "there is no run 'nowhere'"),
    ],
)
def test_mistakes_on_the_command_line(argv, words):
    with pytest.raises(UserError) as error:
        play.main(argv)
    assert words in str(error.value)


def test_a_run_that_is_missing_prepares_nothing(tmp_path):
    with pytest.raises(UserError, match="there is no run"):
        play.main([f"--out_dir={tmp_path / 'none'}", f"--data_dir={tmp_path / 'data'}", "--port=0"])
    assert not (tmp_path / "data").exists()


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(play, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install starlette uvicorn"):
        play.main([])


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_script_prints_its_address_and_ends_at_once(page, number, tmp_path):
    """Also while a page listens to events. The line is all that it prints."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "play.py", "--port=0", f"--data_dir={page.folder / 'data'}"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        address = process.stdout.readline().strip()
        port, token = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\?token=(.*)", address).groups()
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
        connection.request("GET", f"/api/events?token={token}")
        assert connection.getresponse().readline().startswith(b"data: {")
        began = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=10)
        connection.close()
    assert time.monotonic() - began < 2
    assert (process.returncode, out, err) == (128 + number, "", "")

"""quill/data/corpora.py: where a known corpus is found, that it is verified, and what a bad download gives."""

import hashlib
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from quill.data import corpora
from quill.data.corpora import CORPORA, Corpus, locate
from quill.errors import UserError

TEXT = b"It was the best of times, it was the worst of times.\n" * 50_000  # several chunks


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        if self.path == "/missing":
            self.send_error(404)
            return
        body = TEXT[:-1] + b"?" if self.path == "/wrong" else TEXT
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/ok")
            self.end_headers()
            return
        self.send_response(200)
        if self.path != "/unsized":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.path == "/truncated" else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "QUILL_CORPORA"):
        monkeypatch.delenv(name, raising=False)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests = 0
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.corpus = Corpus(
            name="tale",
            file="tale.txt",
            url=f"http://127.0.0.1:{server.server_port}/ok",
            sha256=hashlib.sha256(TEXT).hexdigest(),
        )
        yield server
        server.shutdown()
        thread.join()


def at(server, path):
    return replace(server.corpus, url=server.corpus.url.replace("/ok", path))


@pytest.mark.parametrize("path", ["/ok", "/moved", "/unsized"])
def test_download(server, tmp_path, path, capsys):
    found = locate(at(server, path), data_dir=tmp_path)
    assert found == tmp_path / "tale" / "source.txt"
    assert found.read_bytes() == TEXT
    assert [file.name for file in found.parent.iterdir()] == ["source.txt"]
    assert capsys.readouterr() == ("", "")
    requests = server.requests
    assert locate(server.corpus, data_dir=tmp_path) == found
    assert server.requests == requests  # it is not downloaded a second time


@pytest.mark.parametrize(
    "path, reason",
    [
        ("/missing", "HTTP status 404"),
        ("/truncated", "IncompleteRead"),
        ("/wrong", "is not tale: its SHA-256"),
    ],
)
def test_a_bad_download_is_refused_and_removed(server, tmp_path, path, reason):
    with pytest.raises(UserError, match=reason) as caught:
        locate(at(server, path), data_dir=tmp_path)
    assert "--input=FILE" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tale").exists()


def test_no_network_says_what_to_do(server, tmp_path, monkeypatch):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="refused.*download it by hand.*--input=FILE"):
        locate(server.corpus, data_dir=tmp_path)


def test_a_silent_server_times_out(server, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "TIMEOUT", 0.2)
    monkeypatch.setattr(Handler, "do_GET", lambda self: threading.Event().wait(1))
    with pytest.raises(UserError, match="timed out.*--input=FILE"):
        locate(server.corpus, data_dir=tmp_path)


def test_the_order_of_the_places(server, tmp_path, monkeypatch):
    corpus, folder = server.corpus, tmp_path / "corpora"
    downloaded = locate(corpus, data_dir=tmp_path / "data")
    assert server.requests == 1
    folder.mkdir()
    monkeypatch.setenv("QUILL_CORPORA", str(folder))
    assert locate(corpus, data_dir=tmp_path / "data") == downloaded  # the folder does not hold it
    (folder / "tale.txt").write_bytes(TEXT)
    assert locate(corpus, data_dir=tmp_path / "data") == folder / "tale.txt"
    (tmp_path / "mine.txt").write_bytes(TEXT)
    assert locate(corpus, str(tmp_path / "mine.txt"), tmp_path / "data") == tmp_path / "mine.txt"
    assert server.requests == 1


def test_every_place_is_verified(server, tmp_path, monkeypatch):
    corpus = server.corpus
    source = tmp_path / "tale" / "source.txt"
    source.parent.mkdir()
    source.write_bytes(TEXT + b"!")
    with pytest.raises(UserError, match=r"is not tale: its SHA-256 is \w{12}…, not \w{12}…; delete it"):
        locate(corpus, data_dir=tmp_path)
    with pytest.raises(UserError, match="is not tale.*--input"):
        locate(corpus, input=str(source), data_dir=tmp_path)
    with pytest.raises(UserError, match="No such file.*--input"):
        locate(corpus, input=str(tmp_path / "nowhere"), data_dir=tmp_path)
    (tmp_path / "tale.txt").write_bytes(b"")
    monkeypatch.setenv("QUILL_CORPORA", str(tmp_path))
    with pytest.raises(UserError, match="is not tale.*QUILL_CORPORA"):
        locate(corpus, data_dir=tmp_path)


def test_the_bundled_corpus():
    lines = locate(CORPORA["names"]).read_text(encoding="ascii").split("\n")
    names = [line for line in lines if line]
    assert len(names) >= 1500
    assert len(set(names)) == len(names)
    assert set("".join(names)) == set("abcdefghijklmnopqrstuvwxyz")
    with pytest.raises(UserError, match="bundled"):
        locate(CORPORA["names"], input="other.txt")

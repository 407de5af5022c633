"""The known corpora, and how to find a verified copy of each: in the repository, on this machine, or by download."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from quill.errors import UserError, check
from quill.files import folder_lock, replacing

LARGEST = 2**25  # bytes that are read: more than any of these texts has
TIMEOUT = 30  # seconds without a byte after which a download fails


@dataclass(frozen=True)
class Corpus:
    """A text that `python prepare.py NAME` knows, and how it is tokenized. `url` and `sha256` are empty if bundled."""

    name: str
    file: str  # file name, in the folder $QUILL_CORPORA or, for a bundled corpus, in data/
    url: str = ""
    sha256: str = ""
    documents: str = "none"  # as in --documents


CORPORA = {
    corpus.name: corpus
    for corpus in (
        # 40,000 lines of Shakespeare's plays (public domain), collected for karpathy/char-rnn
        Corpus(
            name="shakespeare_char",
            file="tinyshakespeare.txt",
            url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        ),
        # Given names, typed for quill (MIT, like the rest of it)
        Corpus(name="names", file="names.txt", documents="lines"),
        # 32,033 given names in use in the USA in 2018 (ssa.gov), from karpathy/makemore (MIT)
        Corpus(
            name="names32k",
            file="names32k.txt",
            url="https://raw.githubusercontent.com/karpathy/makemore/master/names.txt",
            sha256="0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d",
            documents="lines",
        ),
    )
}


def locate(corpus: Corpus, input: str = "", data_dir: str | Path = "data") -> Path:
    """Find a copy of `corpus`, verify it and return its path.

    The first of these that exists is used: `input`, the folder $QUILL_CORPORA, an earlier download in `data_dir`.
    If none exists, the corpus is downloaded to `data_dir`. A bundled corpus is always the repository's. Raise a
    UserError if the copy is not the corpus, can't be read, or can't be downloaded.
    """
    if not corpus.url:
        check(not input, f"--input={input}: {corpus.name} is bundled; for another text give --dataset=<a new name>")
        return Path(__file__).parent.parent.parent / "data" / corpus.file
    if input:
        return verify(Path(input), corpus, "give another --input, or none to have it downloaded")
    folder = os.environ.get("QUILL_CORPORA")
    if folder and os.path.isfile(path := Path(folder) / corpus.file):
        return verify(path, corpus, "fix or unset the environment variable QUILL_CORPORA")
    path = Path(data_dir) / corpus.name / "source.txt"
    if os.path.isfile(path):
        return verify(path, corpus, "delete it to have it downloaded again")
    return download(corpus, path)


def verify(path: Path, corpus: Corpus, remedy: str) -> Path:
    """Return `path` if its SHA-256 is that of `corpus`; else raise a UserError that ends with `remedy`."""
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {remedy}") from None
    check_sha256(data, corpus, path, remedy)
    return path


def check_sha256(data: bytes, corpus: Corpus, what: str | Path, remedy: str) -> None:
    """Raise a UserError about `what`, with `remedy` at its end, unless `data` has the SHA-256 of `corpus`."""
    digest = hashlib.sha256(data).hexdigest()
    problem = f"its SHA-256 is {digest[:12]}…, not {corpus.sha256[:12]}…"
    check(digest == corpus.sha256, f"{what} is not {corpus.name}: {problem}; {remedy}")


def download(corpus: Corpus, path: Path) -> Path:
    """Download `corpus` to `path` and return `path`.

    The file appears only when it is complete and verified. Raise a UserError if the server does not send the text.
    """
    # Imported here, because they are slow to import and seldom needed.
    import http.client
    import urllib.error
    import urllib.request

    url, by_hand = corpus.url, f"download it by hand, then `python prepare.py {corpus.name} --input=FILE`"
    remedy = f"{by_hand}; `python train.py config/names.py` needs no network"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            data = response.read()
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(f"{url}: HTTP status {error.code} {error.reason}; {remedy}") from None
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url}: {getattr(error, 'reason', None) or error or type(error).__name__}; {remedy}") from None
    check_sha256(data, corpus, f"the download from {url}", remedy)
    with folder_lock(path.parent, wait=True), replacing(path) as (file,):
        file.write(data)
    return path

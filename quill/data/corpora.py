"""The known corpora: what each is, where it comes from, and a verified copy of it on this machine.

Turning a text into tokens is left to quill/data/token_files.py.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from quill.errors import UserError
from quill.files import replacing

CHUNK = 2**20  # bytes read at a time
TIMEOUT = 30  # seconds without a byte after which a download is given up


@dataclass(frozen=True)
class Corpus:
    name: str
    file: str  # its name in the folder $QUILL_CORPORA; the bundled one lies beside this module
    url: str  # empty: bundled
    sha256: str  # empty: bundled, so the repository vouches for it
    origin: str  # who made it, and under which licence it is used
    tokenizer: str = "char"
    is_documents: bool = False  # each line is a text of its own


CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            name="shakespeare_char",
            file="tinyshakespeare.txt",
            url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            origin="40,000 lines of Shakespeare's plays (public domain), put together for karpathy/char-rnn",
        ),
        Corpus(
            name="names",
            file="names.txt",
            url="",
            sha256="",
            origin="given names, typed for quill (MIT, as the rest of it)",
            is_documents=True,
        ),
        Corpus(
            name="names32k",
            file="names32k.txt",
            url="https://raw.githubusercontent.com/karpathy/makemore/master/names.txt",
            sha256="0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d",
            origin="32,033 given names in use in the USA in 2018 (ssa.gov), from karpathy/makemore (MIT)",
            is_documents=True,
        ),
    )
}


def locate(corpus, input="", data_dir="data"):
    """The path of a verified copy of `corpus`: `input`, $QUILL_CORPORA's, the downloaded one, or downloaded now."""
    if not corpus.url:
        if input:
            raise UserError(f"--input={input}: {corpus.name} is bundled; for another text give --dataset=<a new name>")
        return Path(__file__).parent.parent.parent / "data" / corpus.file
    if input:
        return verify(Path(input), corpus, "give another --input, or none to have it downloaded")
    if folder := os.environ.get("QUILL_CORPORA"):
        path = Path(folder) / corpus.file
        if os.path.isfile(path):
            return verify(path, corpus, "mend or unset the environment variable QUILL_CORPORA")
    path = Path(data_dir) / corpus.name / "source.txt"
    if os.path.isfile(path):
        return verify(path, corpus, "delete it to have it downloaded again")
    return download(corpus, path)


def verify(path, corpus, remedy):
    """`path`, if its bytes are the corpus's."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {remedy}") from None
    check_sha256(digest.hexdigest(), corpus, path, remedy)
    return path


def check_sha256(actual, corpus, what, remedy):
    if actual != corpus.sha256:
        raise UserError(
            f"{what} is not {corpus.name}: its SHA-256 is {actual[:12]}…, not {corpus.sha256[:12]}…; {remedy}"
        )


def download(corpus, path):
    """Download `corpus` to `path`. What isn't the corpus, byte for byte, never gets that name."""
    remedy = f"download it by hand, then `python prepare.py {corpus.name} --input=FILE`"
    digest = hashlib.sha256()
    with replacing(path, shared=True) as (file,):
        for chunk in read_url(corpus.url, f"download {corpus.name}", remedy):
            digest.update(chunk)
            file.write(chunk)
        check_sha256(digest.hexdigest(), corpus, f"what {corpus.url} sent", remedy)
    return path


def read_url(url, title, remedy):
    """Yield what `url` sends, under a progress bar if stderr is a terminal. A UserError if that isn't all of it."""
    # Imported here, because they would slow down every start.
    import http.client
    import urllib.error
    import urllib.request

    from tqdm import tqdm

    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            size, read = response.length, 0
            with tqdm(total=size, unit="B", unit_scale=True, desc=title, disable=None) as bar:
                while chunk := response.read(CHUNK):
                    yield chunk
                    read += len(chunk)
                    bar.update(len(chunk))
        if size is not None and read != size:
            raise UserError(f"{url}: ended after {read:,} of {size:,} bytes; try again, or {remedy}")
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(f"{url}: HTTP status {error.code} {error.reason}; {remedy}") from None
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url}: {getattr(error, 'reason', None) or error or type(error).__name__}; {remedy}") from None

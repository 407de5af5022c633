"""Text files, found and read in pieces: streams and documents. Tokens are left to token_files.py.

A text may be larger than memory. A byte-order mark at the start of a file is dropped, and every kind of line end is
read as a newline.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from quill.errors import UserError

CHUNK = 2**20  # bytes of text in memory at a time
LONGEST_DOCUMENT = 2**24  # characters; a document is in memory as a whole


def find_texts(names: str | Path) -> list[Path]:
    """Return the files that --input names: a file, or files and patterns such as texts/*.txt, with commas between."""
    if os.path.exists(names):  # unlike Path.exists, it answers without the permission to look
        paths = [str(names)]
    else:
        paths = [path for part in str(names).split(",") for path in sorted(glob.glob(part, recursive=True)) or [part]]
    for path in paths:
        if not os.path.isfile(path):
            reason = "not a regular file" if os.path.exists(path) else "no such file"
            raise UserError(f"{path or names}: {reason}; --input=FILE names a text")
    return [*map(Path, paths)]


class Texts:
    """UTF-8 text files, read one after the other. A document ends where its file ends."""

    def __init__(self, paths: list[Path], documents: str, bar: tqdm) -> None:
        """documents: as in --documents. bar: the progress bar to update with the number of bytes read."""
        self.paths, self.documents, self.bar = paths, documents, bar
        self.is_documents = documents != "none"
        self.name = ", ".join(map(str, paths))  # for messages
        self.size = sum(path.stat().st_size for path in paths)  # in bytes

    def pieces(self, digest: hashlib._Hash) -> Iterator[list[str]]:
        """Read the files and yield lists of documents, or of a stream [some text]. None of these strings is empty.

        The bytes of the files are added to `digest`.
        """
        for path in self.paths:
            if not self.is_documents:
                yield from ([text] for text in self.decoded(path, digest))
                continue
            documents = self.lines(path, digest)
            if self.documents == "blank_lines":
                documents = paragraphs(documents, path)
            elif self.documents.startswith("jsonl:"):
                documents = json_fields(documents, path, self.documents.removeprefix("jsonl:"))
            for some in documents:
                if some := list(filter(str.strip, some)):
                    yield some

    def lines(self, path: Path, digest: hashlib._Hash) -> Iterator[list[str]]:
        """Read a file and yield its lines, a list at a time."""
        rest = ""
        for text in self.decoded(path, digest):
            *lines, rest = (rest + text).split("\n")
            check_length(len(rest), path)
            yield lines
        yield [rest]

    def decoded(self, path: Path, digest: hashlib._Hash) -> Iterator[str]:
        """Read a file and yield its text in pieces, none of them empty; add its bytes to `digest`.

        Raise a UserError if the file can't be read, or, with the byte and the line, if it is not UTF-8.
        """
        newlines = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
        at, chunk = 0, b"-"
        try:
            with open(path, "rb") as file:
                while chunk:
                    chunk = file.read(CHUNK)
                    digest.update(chunk)
                    mark = len(codecs.BOM_UTF8) if at == 0 and chunk.startswith(codecs.BOM_UTF8) else 0
                    at += len(chunk)
                    if text := newlines.decode(chunk[mark:], final=not chunk):
                        yield text
                    self.bar.update(len(chunk))
        except UnicodeDecodeError as error:
            # error.object ends at byte `at` of the file, but it may begin in an earlier chunk.
            at += error.start - len(error.object)
            raise UserError(
                f"{path}: not UTF-8 at byte {at} (line {line_number(path, at)}): {error.reason}; save it as UTF-8"
            ) from None
        except OSError as error:
            raise UserError(f"{path}: can't be read: {error.strerror}") from None


def line_number(path: Path, at: int) -> int:
    """Return the number of the line with byte `at` of a file, from 1."""
    newlines, line = io.IncrementalNewlineDecoder(None, translate=True), 1
    with open(path, "rb") as file:
        for start in range(0, at, CHUNK):
            line += newlines.decode(file.read(min(CHUNK, at - start)).decode("latin-1")).count("\n")
    return line + newlines.decode("", True).count("\n")


def check_length(characters: int, path: Path) -> None:
    """Raise a UserError if a document of so many characters is too long."""
    if characters > LONGEST_DOCUMENT:
        raise UserError(f"{path}: a document is longer than {LONGEST_DOCUMENT:,} characters; see --documents")


def paragraphs(lines: Iterable[list[str]], path: Path) -> Iterator[list[str]]:
    """Join the lines between blank lines to documents, and yield these, a list at a time."""
    document = []
    for some in chain(lines, [[""]]):
        done = []
        for line in some:
            if line.strip():
                document.append(line)
            elif document:
                done.append("\n".join(document))
                document = []
        check_length(sum(map(len, document)), path)
        yield done


def json_fields(lines: Iterable[list[str]], path: Path, field: str) -> Iterator[list[str]]:
    """Yield the text in `field` of the JSON object on each line, a list at a time. Blank lines are left out."""
    number = 0
    for some in lines:
        documents = []
        for line in some:
            number += 1
            try:
                if line.strip():
                    documents.append(json.loads(line)[field])
                    documents[-1].encode()
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
                problem = f"not a JSON object with a text in {field!r}; see --documents"
                raise UserError(f"{path}, line {number}: {problem}") from None
        yield documents

"""quill/data/tokenizers.py: ids by hand, round trips, streams, prompts, unknown characters, JSON."""

import json
import random

import numpy as np
import pytest

from quill.data.tokenizers import ByteTokenizer, CharTokenizer, from_json
from quill.errors import UserError

TEXTS = ["hello\nworld\n", "naïve Straße 日本語 🙂\u2028\x00\x7f", "a\u0301\ufeff\U0010ffff", "", "x" * 1000]


def all_kinds(text):
    kinds = (lambda is_documents: CharTokenizer(text, is_documents), ByteTokenizer)
    return [make(is_documents) for is_documents in (False, True) for make in kinds]


def test_char_ids_are_nanogpts():
    text = "To be, or not to be:\nthat is the question. ß€🙂"
    stoi = {char: i for i, char in enumerate(sorted(set(text)))}
    tokenizer = CharTokenizer(text)
    assert tokenizer.encode(text).tolist() == [stoi[char] for char in text]
    assert tokenizer.vocab_size == len(stoi)
    assert tokenizer.bos is None


def test_byte_ids_are_the_utf8():
    assert ByteTokenizer().encode("aß€").tolist() == list("aß€".encode())
    assert ByteTokenizer().vocab_size == 256
    assert ByteTokenizer().bos is None


def test_bos_is_the_last_id_and_replaces_the_newline():
    tokenizer = CharTokenizer("anna\nbob", is_documents=True)
    assert tokenizer.chars == "abno"
    assert tokenizer.bos == 4
    assert tokenizer.vocab_size == 5
    assert tokenizer.encode("\nanna\nbob").tolist() == [4, 0, 2, 2, 0, 4, 1, 3, 1]
    assert tokenizer.decode([4, 0, 2]) == "\nan"
    assert ByteTokenizer(is_documents=True).encode("\na").tolist() == [256, 97]
    assert ByteTokenizer(is_documents=True).decode([256, 97]) == "\na"


def test_token_bytes_are_those_of_the_text():
    """At the edges of UTF-8's four lengths, and for BOS, which is a newline."""
    text = "\n\x00\x7f\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff"
    for tokenizer in all_kinds(text):
        sizes = tokenizer.token_bytes()
        assert sizes.shape == (tokenizer.vocab_size,) and sizes.dtype == np.int64
        assert sizes[tokenizer.encode("\n" + text)].sum() == 1 + len(text.encode())
    chars = CharTokenizer(text)
    assert [len(char.encode()) for char in chars.chars] == chars.token_bytes().tolist()
    assert CharTokenizer("é", is_documents=True).token_bytes().tolist() == [2, 1]
    assert ByteTokenizer(is_documents=True).token_bytes().tolist() == [1] * 257
    assert CharTokenizer("\ud800\udc80").token_bytes().tolist() == [1, 1]  # from a meta.json that was edited by hand


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text):
    for tokenizer in all_kinds(text):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64
        assert tokenizer.decode(ids) == text == tokenizer.decode(ids.tolist())
        assert tokenizer.vocab_size > ids.max(initial=0) or not text


def test_a_stream_gives_the_same_text_in_whole_characters():
    text = "".join(TEXTS)
    rng = random.Random(0)
    for tokenizer in all_kinds(text):
        ids, decode, pieces = tokenizer.encode(text).tolist(), tokenizer.decoder(), []
        while ids:
            count = rng.randint(1, 3)
            pieces.append(decode(ids[:count]))
            ids = ids[count:]
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) == text


def test_bytes_that_are_not_utf8_become_replacement_characters():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([0x61, 0xFF, 0x62]) == "a\ufffdb"
    assert tokenizer.decode([0x61, 0xC3]) == "a\ufffd"
    assert (decode := tokenizer.decoder())([0x61, 0xC3]) == "a"
    assert decode([0x9F]) == "ß"


def test_unknown_characters_are_named():
    tokenizer = CharTokenizer("bd")
    with pytest.raises(UserError, match=r"^'ß', '€' \(2 characters that are not in the vocabulary\)$"):
        tokenizer.encode("b€ßd€")
    for char in "ac\x00🙂":  # before, between and after the known ones
        with pytest.raises(UserError, match=r"\(1 character that is not in the vocabulary\)"):
            tokenizer.encode("b" + char)
    with pytest.raises(UserError, match=r", … \(26 characters"):
        tokenizer.encode("".join(map(chr, range(0x4E00, 0x4E00 + 26))))


def test_half_a_surrogate_pair_is_an_unknown_character():
    for tokenizer in all_kinds("abc\n"):
        with pytest.raises(UserError, match=r"^'\\udce9' \(1 character"):
            tokenizer.encode("a\udce9")


def test_prompts():
    stream, documents = CharTokenizer("ab\n"), CharTokenizer("ab\n", is_documents=True)
    assert stream.prompt("ab").tolist() == [1, 2]
    assert stream.prompt("").tolist() == [0]
    assert documents.prompt("ab").tolist() == [2, 0, 1]
    assert documents.prompt("").tolist() == [2]
    assert CharTokenizer("ab").prompt("").tolist() == [0]  # without a newline in the vocabulary, its first character
    assert ByteTokenizer().prompt("").tolist() == [10]


def test_json_and_equality():
    kinds = all_kinds("ab\nß🙂") + [CharTokenizer("ab"), CharTokenizer("ab", is_documents=True)]
    for i, tokenizer in enumerate(kinds):
        again = from_json(json.loads(json.dumps(tokenizer.to_json())))
        assert [again == other for other in kinds] == [i == j for j in range(len(kinds))]
        assert hash(again) == hash(tokenizer)
        assert type(again) is type(tokenizer)
    assert CharTokenizer("baab") == CharTokenizer("ab") != "ab"


@pytest.mark.parametrize(
    "values",
    [
        None,
        {},
        {"kind": "wordpiece", "documents": False},
        {"kind": ["char"], "documents": False},
        {"kind": "byte"},
        {"kind": "char", "documents": False},
        {"kind": "char", "documents": False, "chars": ["a", "b"]},
        {"kind": "char", "documents": False, "chars": "ba"},
        {"kind": "char", "documents": False, "chars": "aab"},
        {"kind": "char", "documents": True, "chars": "\nab"},
        {"kind": "char", "documents": 1, "chars": "ab"},
    ],
)
def test_a_description_that_is_not_ours_is_refused(values):
    with pytest.raises(UserError, match="kind|damaged"):
        from_json(values)

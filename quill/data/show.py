"""What a text becomes in a dataset: tokens, ids, and the examples in one window. `prepare.py --show` prints it."""

from collections.abc import Iterator

from quill.cli import highlight
from quill.data.token_files import open_dataset, prepare_if_missing
from quill.errors import UserError

LONGEST = 16  # tokens in a window


def show(dataset: str, data_dir: str, text: str) -> Iterator[str]:
    """Yield lines with the first window of `text`, x and y (T,). Raise a UserError if `text` does not make one."""
    prepare_if_missing(dataset, data_dir)
    tokenizer = open_dataset(data_dir, dataset).tokenizer
    ids = [*tokenizer.prompt(text).tolist(), *([tokenizer.bos] * tokenizer.is_documents)][: LONGEST + 1]
    if len(ids) < 2 or tokenizer.bos in ids[1:-1]:
        raise UserError(f"--show={text}: give one document, or two characters or more")
    names = [repr(tokenizer.decode([i], "backslashreplace"))[1:-1].replace(" ", "␣") for i in ids]
    names = ["BOS" if i == tokenizer.bos else name for i, name in zip(ids, names, strict=True)]
    size = max(len(cell) for cell in (*names, *map(str, ids)))
    for label, start in (("x", 0), ("y", 1)):
        for title, row in ((highlight(label), names), (" ", ids)):
            yield f"{title}  {' '.join(f'{cell:>{size}}' for cell in row[start : start + len(ids) - 1])}"
    yield highlight(f"The {len(ids) - 1} examples in this window: what the model sees → what it is to predict")
    yield from (f"{t:>2}  {' '.join(names[: t + 1])} → {names[t + 1]}" for t in range(len(ids) - 1))

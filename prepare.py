"""Turn a text into token files: data/<dataset>/{train.bin, val.bin, meta.json}.

    python prepare.py shakespeare_char                                  # a known corpus; others: names, names32k
    python prepare.py --input=my.txt --dataset=mine                     # your own text, in UTF-8
    python prepare.py --input=my.txt --dataset=mine --documents=lines   # every line is a separate document
    python prepare.py --input=my.txt --dataset=mine --tokenizer=byte    # tokens are bytes, not characters
    python prepare.py --input=my.txt --dataset=mine --tokenizer=bpe     # tokens are pieces of words, found in the text
    python prepare.py --bins=FOLDER --dataset=owt --tokenizer=PATH      # train.bin and val.bin of nanoGPT's
    python prepare.py shakespeare_char --show="First Citizen"           # the ids of a text, and its examples

A known corpus is read from --input, the folder $QUILL_CORPORA or an earlier download. Otherwise it is downloaded.
"""

if __name__ == "__main__":
    import quill.start  # noqa: F401 - must be the first import

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from quill.cli import did_you_mean, highlight, read_args, run
from quill.data.corpora import CORPORA
from quill.errors import UserError, check
from quill.options import PrepareConfig

USAGE = f"python prepare.py {' | '.join(CORPORA)}, or python prepare.py --input=my.txt --dataset=mine"
UNITS = {"char": "characters", "byte": "bytes", "bpe": "tokens of byte-level BPE"}
LONGEST_WINDOW = 16  # tokens that --show prints


def read_options(argv: list[str]) -> PrepareConfig:
    """Read a command line into options, with those of a known corpus that it names. Raise a UserError for a mistake."""
    names, flags = read_args(argv, PrepareConfig, __doc__)
    config = PrepareConfig(**flags)
    check(len(names) <= 1, f"give one corpus, not {len(names)}: {' '.join(names)}")
    if "show" in flags and (not config.show or flags.keys() - {"show", "dataset", "data_dir"}):
        raise UserError("--show=TEXT takes a text, and no other options than --dataset and --data_dir")
    if not names:
        check(config.dataset or not config.show, "--show: name a dataset, as in python prepare.py names --show=emma")
        if not config.show:
            check_own_text(config)
        return config
    name = names[0]
    if name not in CORPORA:
        hint = f"the known ones are {', '.join(CORPORA)}"
        if Path(name).is_file():
            hint = f"to prepare that file, `python prepare.py --input={name} --dataset=<a name for it>`"
        raise UserError(f"{name} is not a known corpus; {hint}{did_you_mean(name, CORPORA)}")
    corpus = CORPORA[name]
    fixed = {"dataset": name, "tokenizer": PrepareConfig.tokenizer, "documents": corpus.documents, "bins": ""}
    remedy = "leave it out, or prepare the text as your own with --input=FILE --dataset=<a new name>"
    for key, value in fixed.items():
        given = flags.get(key, value)
        check(given == value, f"--{key}={given}: {name} has {key}={value}; {remedy}")
    return replace(config, dataset=name, documents=corpus.documents)


def check_own_text(config: PrepareConfig) -> None:
    """Raise a UserError unless --input and --dataset say how to prepare the user's own text."""
    given = f"--bins={config.bins}" if config.bins else f"--input={config.input}"
    if config.bins and (config.input or config.documents != "none" or config.tokenizer in UNITS):
        raise UserError(f"{given}: give the ids' --tokenizer=PATH with it, and neither --input nor --documents")
    check(config.input or config.bins or config.dataset, f"no corpus and no --input given; use {USAGE}")
    if not (config.input or config.bins):
        fix = f"use `python prepare.py {config.dataset}`" if config.dataset in CORPORA else "add --input=FILE"
        raise UserError(f"--dataset={config.dataset}: no --input given; {fix}")
    check(config.dataset, f"{given}: no name given for the dataset; add one, as in --dataset=mine")
    fix = f"if {config.input} is that corpus, `python prepare.py {config.dataset} --input={config.input}`"
    problem = f"--dataset={config.dataset} is the name of a known corpus; choose another, or, {fix}"
    check(config.dataset not in CORPORA, problem)
    rule = "use only letters, digits and - _ . in the name, and begin it with a letter"
    check(re.fullmatch(r"\w[\w.-]*", config.dataset), f"--dataset={config.dataset}: {rule}, as in --dataset=mine")


def main(argv: list[str]) -> None:
    """Prepare the text that `argv` names and say what was written, or show what a text becomes in a dataset."""
    config = read_options(argv)
    from quill.data import token_files  # it imports numpy, which --help does not need

    folder = Path(config.data_dir) / config.dataset
    if config.show:
        token_files.prepare_if_missing(config.dataset, config.data_dir)
        print(*show(token_files.open_dataset(config.data_dir, config.dataset).tokenizer, config.show), sep="\n")
        return
    if config.dataset in CORPORA:
        meta = token_files.prepare_corpus(CORPORA[config.dataset], config.data_dir, config.input)
    elif config.bins:
        meta = token_files.take_over(config.bins, folder, config.tokenizer)
    else:
        settings = {"documents": config.documents, "vocab_size": config.vocab_size}
        meta = token_files.prepare(config.input, folder, config.tokenizer, **settings)
    report(folder, meta, config)


def show(tokenizer: Any, text: str) -> Iterator[str]:
    """Yield lines with the first window of `text`, x and y (T,). Raise a UserError if `text` does not make one."""
    ids = [*tokenizer.prompt(text).tolist(), *([tokenizer.bos] * tokenizer.is_documents)][: LONGEST_WINDOW + 1]
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


def report(folder: Path, meta: dict[str, Any], config: PrepareConfig) -> None:
    """Print what was written to `folder`, whose meta.json has the values `meta`, and the command that trains on it."""
    from quill.data.tokenizers import from_json

    name, tokenizer = folder.name, from_json(meta["tokenizer"])
    for split, values in meta["splits"].items():
        print(f"{split + ':':12}{values['tokens']:,} tokens")
    bos = " and BOS" if tokenizer.vocab_size > tokenizer.size else ""
    print(f"{'vocabulary:':12}{tokenizer.size:,} {UNITS[tokenizer.kind]}{bos}")
    if tokenizer.is_documents and not tokenizer.bos_is_newline:
        print(f"{'documents:':12}{config.documents}; each starts with the id {tokenizer.bos}, BOS")
    print(f"{'written to:':12}{folder}")
    command = f"python train.py config/{name}.py"
    if name not in CORPORA:
        base = "names" if tokenizer.bos_is_newline else "shakespeare_char_cpu"
        command = f"python train.py config/{base}.py --dataset={name} --out_dir=out/{name}"
    print(f"{'next:':12}{command}{'' if config.data_dir == 'data' else f' --data_dir={config.data_dir}'}")


if __name__ == "__main__":
    run(main)

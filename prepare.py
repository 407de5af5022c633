"""Turn a text into token files: data/<dataset>/{train.bin, val.bin, meta.json}.

    python prepare.py shakespeare_char                                  # a known corpus: or names, names32k
    python prepare.py --input=my.txt --dataset=mine                     # your own text, UTF-8
    python prepare.py --input=my.txt --dataset=mine --documents=lines   # every line is a text of its own, as in names
    python prepare.py --input=my.txt --dataset=mine --tokenizer=byte    # a token is a byte and not a character

A known corpus is taken from --input, the folder $QUILL_CORPORA or an earlier download, or else is downloaded.
"""

import re
from pathlib import Path

from quill.cli import did_you_mean, read_args, run
from quill.data.corpora import CORPORA
from quill.errors import UserError
from quill.options import PrepareConfig

USAGE = f"python prepare.py {' | '.join(CORPORA)}, or python prepare.py --input=my.txt --dataset=mine"
UNITS = {"char": "characters", "byte": "bytes"}


def read_options(argv):
    """`argv` → (config, the known corpus that it asks for or None)."""
    names, flags = read_args(argv, PrepareConfig, __doc__)
    config = PrepareConfig(**flags)
    if len(names) > 1:
        raise UserError(f"one corpus at a time, not {len(names)}: {' '.join(names)}")
    if not names:
        check_own_text(config)
        return config, None
    if names[0] not in CORPORA:
        hint = f"the known ones are {', '.join(CORPORA)}"
        if Path(names[0]).is_file():
            hint = f"to prepare that file, `python prepare.py --input={names[0]} --dataset=<a name for it>`"
        raise UserError(f"{names[0]} is not a known corpus; {hint}{did_you_mean(names[0], CORPORA)}")
    corpus = CORPORA[names[0]]
    fixed = {
        "dataset": corpus.name,
        "tokenizer": corpus.tokenizer,
        "documents": "lines" if corpus.is_documents else "none",
    }
    for key, value in fixed.items():
        if flags.get(key, value) != value:
            raise UserError(
                f"--{key}={flags[key]}: {corpus.name} has {key}={value}; leave it out, "
                "or prepare the text as your own with --input=FILE --dataset=<a new name>"
            )
    return config, corpus


def check_own_text(config):
    if not config.input and not config.dataset:
        raise UserError(f"what should be prepared? {USAGE}")
    if not config.input:
        known = f"`python prepare.py {config.dataset}`" if config.dataset in CORPORA else "--input=FILE"
        raise UserError(f"--dataset={config.dataset}: of which text? give {known}")
    if not config.dataset:
        raise UserError(f"--input={config.input}: give a name for the dataset too, as in --dataset=mine")
    if config.dataset in CORPORA:
        raise UserError(
            f"--dataset={config.dataset} is the name of a known corpus; choose another, "
            f"or, if {config.input} is that corpus, `python prepare.py {config.dataset} --input={config.input}`"
        )
    if not re.fullmatch(r"\w[\w.-]*", config.dataset):
        raise UserError(f"--dataset={config.dataset}: a folder's name takes letters, digits and - _ . only, as in mine")


def main(argv):
    config, corpus = read_options(argv)
    from quill.data.token_files import prepare, prepare_corpus  # numpy, which --help and the errors above do without

    if corpus:
        folder, meta = Path(config.data_dir) / corpus.name, prepare_corpus(corpus, config.data_dir, config.input)
    else:
        folder = Path(config.data_dir) / config.dataset
        meta = prepare(config.input, folder, config.tokenizer, config.documents == "lines")
    report(folder, meta, config.data_dir)


def report(folder, meta, data_dir):
    """Say what was written and what to do next."""
    name, kind, ids = folder.name, meta["tokenizer"]["kind"], meta["tokenizer"].get("chars", range(256))
    for split, values in meta["splits"].items():
        print(f"{split + ':':12}{values['tokens']:,} tokens")
    print(f"{'vocabulary:':12}{len(ids):,} {UNITS[kind]}{' and BOS' if meta['documents'] else ''}")
    print(f"{'written to:':12}{folder}")
    command = f"python train.py config/{name}.py"
    if name not in CORPORA:
        base = "names" if meta["documents"] else "shakespeare_char_cpu"
        command = f"python train.py config/{base}.py --dataset={name} --out_dir=out/{name}"
    print(f"{'next:':12}{command}{'' if data_dir == 'data' else f' --data_dir={data_dir}'}")


if __name__ == "__main__":
    run(main)

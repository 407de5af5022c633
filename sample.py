"""Write text with a trained model, or score one. A checkpoint is all that it needs; nanoGPT's ckpt.pt opens too.

python sample.py --out_dir=out/shakespeare_char --start="ROMEO:" --num_samples=3
python sample.py --ckpt=out/names/last.pt --temperature=0.5 --top_p=0.9
python sample.py --out_dir=out/shakespeare_char --start=FILE:prompt.txt --max_new_tokens=1000
python sample.py --out_dir=out/names --score=anna

--score shows, for each token of a text, what the model expected and what the token's loss is; then the total. Documents
are scored line by line, with their ends; the first character of a stream as what follows a newline (quill/scoring.py).
"""

import sys
from pathlib import Path

import torch

from quill import checkpoint, scoring
from quill.cli import read_args, run
from quill.data.batches import derive_seed
from quill.data.token_files import open_dataset
from quill.data.tokenizers import from_json
from quill.errors import UserError
from quill.machine import memory_limits, pick_machine
from quill.options import SampleConfig

DRAWING = ("start", "num_samples", "max_new_tokens", "top_k", "top_p", "seed")  # options that a score does not have
COLDEST = 1e-6  # temperature of a score: below it, logits / temperature may be too large for float32


def read_options(argv):
    """`argv` → (config, whether a text is to be scored)."""
    positional, flags = read_args(argv, SampleConfig, __doc__)
    if positional:
        raise UserError(f"{positional[0]}: options are written --key=value (see --help)")
    if "score" not in flags:
        if flags.get("json"):
            raise UserError("--json is for a score; give --score=TEXT too")
        return SampleConfig(**flags), False
    if drawing := [f"--{key}" for key in DRAWING if key in flags]:
        raise UserError(f"--score and {', '.join(drawing)} don't go together: a score draws no text")
    # 0.8 is for drawing; at 1, the losses are those of training.
    config = SampleConfig(**({"temperature": 1.0} | flags))
    if config.temperature < COLDEST:
        raise UserError(f"--temperature={config.temperature}: must be at least {COLDEST} with --score")
    return config, True


def find_checkpoint(config):
    """`--ckpt`, else out_dir's best.pt, last.pt, or nanoGPT's ckpt.pt."""
    if config.ckpt:
        return Path(config.ckpt)
    names = ("best.pt", "last.pt", "ckpt.pt")
    for name in names:
        if (Path(config.out_dir) / name).is_file():
            return Path(config.out_dir) / name
    raise UserError(f"--out_dir={config.out_dir}: holds none of {', '.join(names)}; train a run first, or give --ckpt")


def find_tokenizer(state, config, path):
    """The checkpoint's own; nanoGPT keeps it with the dataset, so there it is the one of the dataset prepared here."""
    if state["tokenizer"] is not None:
        return from_json(state["tokenizer"])
    name = state["config"]["dataset"]
    try:
        tokenizer = open_dataset(config.data_dir, name).tokenizer
    except UserError as error:
        raise UserError(f"{path} is nanoGPT's, which keeps the characters with the dataset {name}; {error}") from None
    if tokenizer.vocab_size != state["vocab_size"]:
        raise UserError(
            f"{path} has {state['vocab_size']} ids, but {config.data_dir}/{name} has {tokenizer.vocab_size}"
        )
    return tokenizer


def read_text(key, value):
    """The text of an option such as `--start`: its value, or what is in the file that it names."""
    if not value.startswith("FILE:"):
        return value
    path = Path(value.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--{key}={value}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"--{key}={value}: {error.strerror}") from None


def as_given(key, value):
    """`--key=value` for a message: on one line, whatever the text."""
    value = value if value.isprintable() else repr(value)[1:-1]
    return f"--{key}={value if len(value) <= 80 or value.startswith('FILE:') else value[:79] + '…'}"


def sample(model, tokenizer, prompt, config, machine, write):
    """Draw config.num_samples texts at once, and `write` them: the first as it comes, the others when all are done."""
    generator = torch.Generator(machine.device).manual_seed(derive_seed("sample", config.seed))
    ids = torch.from_numpy(tokenizer.prompt(prompt)).long().to(machine.device)
    separator = "\n" if tokenizer.bos is not None else "\n---------------\n"
    first, ended = tokenizer.stream(), False

    def stream(tokens):
        nonlocal ended
        token = tokens[0].item()
        ended = ended or token == tokenizer.bos
        if not ended:
            write(first([token]))

    write(prompt)
    out = model.generate(
        ids.repeat(config.num_samples, 1),
        config.max_new_tokens,
        config.temperature,
        config.top_k,
        config.top_p,
        stop_token=tokenizer.bos,
        generator=generator,
        on_token=stream,
    )
    write(first([], final=True) + separator)
    for row in out[1:, ids.numel() :].tolist():
        if tokenizer.bos in row:
            row = row[: row.index(tokenizer.bos)]
        write(prompt + tokenizer.decode(row) + separator)


def write(text):
    sys.stdout.write(text)
    sys.stdout.flush()


def main(argv):
    config, scores = read_options(argv)
    path = find_checkpoint(config)
    state = checkpoint.load(path)
    tokenizer = find_tokenizer(state, config, path)
    key = "score" if scores else "start"
    text, given = read_text(key, getattr(config, key)), as_given(key, getattr(config, key))
    if scores and not scoring.split_documents(text, tokenizer):
        raise UserError(f"{given}: there is no text to score")
    try:
        ids, characters = scoring.encode(text, tokenizer) if scores else (tokenizer.encode(text), len(text))
    except UserError as error:
        raise UserError(f"{given}: {error}; {path} knows the characters of its training text") from None
    machine = pick_machine(config)
    with memory_limits(machine):
        # The weights themselves in half precision: reading them is most of the work of drawing a token.
        model = checkpoint.load_model(state, path).to(machine.device, machine.dtype)
        if not scores:
            sample(model, tokenizer, text, config, machine, write)
            return
        rows = scoring.score(model, tokenizer, ids, config.temperature, machine.device)
        lines = [scoring.to_json(rows, characters)] if config.json else scoring.table(rows, tokenizer, characters)
        for line in lines:
            print(line)


if __name__ == "__main__":
    run(main)

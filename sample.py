"""Write text with a trained model. A checkpoint is all that it needs; nanoGPT's ckpt.pt opens too.

python sample.py --out_dir=out/shakespeare_char --start="ROMEO:" --num_samples=3
python sample.py --ckpt=out/names/last.pt --temperature=0.5 --top_p=0.9
python sample.py --out_dir=out/shakespeare_char --start=FILE:prompt.txt --max_new_tokens=1000
"""

import sys
from pathlib import Path

import torch

import checkpoint
from config._cli import read_args, run
from config._errors import UserError
from config._machine import pick_machine
from config._schema import SampleConfig
from data.batches import derive_seed
from data.token_files import open_dataset
from data.tokenizers import from_json


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


def read_prompt(config):
    """`--start`, or the text of the file that it names."""
    if not config.start.startswith("FILE:"):
        return config.start
    path = Path(config.start.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--start={config.start}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"--start={config.start}: {error.strerror}") from None


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


def main(argv):
    positional, flags = read_args(argv, SampleConfig, __doc__)
    if positional:
        raise UserError(f"{positional[0]}: options are written --key=value (see --help)")
    config = SampleConfig(**flags)
    path = find_checkpoint(config)
    state = checkpoint.load(path)
    tokenizer = find_tokenizer(state, config, path)
    prompt = read_prompt(config)
    try:
        tokenizer.encode(prompt)
    except UserError as error:
        raise UserError(f"--start={config.start}: {error}; {path} knows the characters of its training text") from None
    machine = pick_machine(config)
    # The weights themselves in half precision: reading them is most of the work of drawing a token.
    model = checkpoint.load_model(state, path).to(machine.device, machine.dtype)

    def write(text):
        sys.stdout.write(text)
        sys.stdout.flush()

    sample(model, tokenizer, prompt, config, machine, write)


if __name__ == "__main__":
    run(main)

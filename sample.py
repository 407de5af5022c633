"""Write text with a trained model, or show how likely a model finds a text. It needs only a checkpoint.

    python sample.py --out_dir=out/shakespeare_char --start="ROMEO:" --num_samples=3
    python sample.py --out_dir=out/shakespeare_char --start=FILE:prompt.txt --max_new_tokens=1000
    python sample.py --ckpt=out/names/last.pt --temperature=0.5 --top_p=0.9    # nanoGPT's ckpt.pt works too
    python sample.py --out_dir=out/names --score=anna

--score prints a row for each token of a text: what the model expected, and the token's loss. The totals follow. A model
of documents scores each line and its end, or all of the text where newlines do not end a document. Any other model
scores the text as if it followed a newline.
"""

if __name__ == "__main__":
    import quill.start  # noqa: F401 - must be the first import

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import GPT
from quill import checkpoint, cpu, scoring
from quill.cli import read_args, run
from quill.data.batches import derive_seed
from quill.data.token_files import open_dataset
from quill.data.tokenizers import Tokenizer, from_json
from quill.errors import UserError
from quill.generation import stream_tokens
from quill.machine import Machine, memory_limits, pick_machine
from quill.options import SampleConfig

# Options that --score does not take.
SAMPLING_OPTIONS = ("start", "num_samples", "max_new_tokens", "top_k", "top_p", "seed")
LONGEST_TEXT = 2**26  # bytes of a file in --start or --score
COLDEST = 1e-6  # lowest temperature of --score: below it, logits / temperature may be too large for float32


def read_options(argv: list[str]) -> tuple[SampleConfig, bool]:
    """Read a command line into options, and whether it asks for a score. Raise a UserError for a mistake in it."""
    positional, flags = read_args(argv, SampleConfig, __doc__)
    if positional:
        raise UserError(f"{positional[0]}: options are written --key=value (see --help)")
    if "score" not in flags:
        if flags.get("json"):
            raise UserError("--json is for a score; give --score=TEXT too")
        return SampleConfig(**flags), False
    if drawing := [f"--{key}" for key in SAMPLING_OPTIONS if key in flags]:
        raise UserError(f"--score and {', '.join(drawing)} don't go together: a score draws no text")
    defaults: dict[str, Any] = {"temperature": 1.0}  # the losses are then those of training
    config = SampleConfig(**(defaults | flags))
    if config.temperature < COLDEST:
        raise UserError(f"--temperature={config.temperature}: must be at least {COLDEST} with --score")
    return config, True


def find_checkpoint(config: SampleConfig) -> Path:
    """Return the path of the checkpoint: --ckpt, else the best one of --out_dir."""
    return Path(config.ckpt) if config.ckpt else checkpoint.find(config.out_dir)


def find_tokenizer(state: dict[str, Any], config: SampleConfig, path: str | Path) -> Tokenizer:
    """Return the tokenizer of the checkpoint `state`, which was loaded from `path`.

    nanoGPT's checkpoints have none, because nanoGPT stores it with the dataset. For them, the dataset of the same name
    in --data_dir is opened.
    """
    if state["tokenizer"] is not None:
        return from_json(state["tokenizer"])
    name = state["config"]["dataset"]
    if not name:
        raise UserError(f"{path}: has no tokenizer that can be read; fine-tune it on a dataset, which has one")
    try:
        tokenizer = open_dataset(config.data_dir, name).tokenizer
    except UserError as error:
        raise UserError(
            f"{path} is a nanoGPT checkpoint. Its characters are in the dataset {name}, which can't be opened: {error}"
        ) from None
    if tokenizer.vocab_size != state["vocab_size"]:
        raise UserError(
            f"{path} has {state['vocab_size']} ids, but {config.data_dir}/{name} has {tokenizer.vocab_size}; "
            "give the --data_dir of the dataset that it was trained on"
        )
    return tokenizer


def read_text(key: str, value: str) -> str:
    """Return the text of an option such as --start: its value, or the content of the file in --start=FILE:NAME."""
    if not value.startswith("FILE:"):
        return value
    path = Path(value.removeprefix("FILE:"))
    try:
        with open(path, "rb") as file:  # may be a pipe
            data = file.read(LONGEST_TEXT + 1)
        if len(data) > LONGEST_TEXT:
            raise UserError(f"--{key}={value}: longer than {LONGEST_TEXT // 2**20} MiB")
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--{key}={value}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"--{key}={value}: {error.strerror}") from None


def as_given(key: str, value: str) -> str:
    """Format --key=value for an error message: on one line, and shortened if the text is long."""
    value = value if value.isprintable() else repr(value)[1:-1]
    return f"--{key}={value if len(value) <= 80 or value.startswith('FILE:') else value[:79] + '…'}"


def encode_text(tokenizer: Tokenizer, config: SampleConfig, is_score: bool, path: Path) -> tuple[np.ndarray, str]:
    """Read the text of --score or --start and encode it.

    Returns:
        The ids (T,) and the text. With --score, they are those that quill/scoring.py scores.

    Raises:
        UserError: there is nothing to score, or the vocabulary of the checkpoint `path` lacks a character.
    """
    key = "score" if is_score else "start"
    value = getattr(config, key)
    text, given = read_text(key, value), as_given(key, value)
    if is_score and not scoring.split_documents(text, tokenizer):
        raise UserError(f"{given}: there is no text to score")
    try:
        return scoring.encode(text, tokenizer) if is_score else (tokenizer.encode(text), text)
    except UserError as error:
        reason = f"the vocabulary of {path} has only the characters of its training text"
        raise UserError(f"{given}: {error}; {reason}") from None


def sample(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    config: SampleConfig,
    machine: Machine,
    write: Callable[[str], None],
) -> None:
    """Draw config.num_samples texts at once. The first is written token by token, the others when all are done.

    write: called with each piece of text.
    """
    generator = torch.Generator(machine.device).manual_seed(derive_seed("sample", config.seed))
    ids = torch.from_numpy(tokenizer.prompt(prompt)).long().to(machine.device)
    separator = "\n" if tokenizer.bos_is_newline else "\n---------------\n"
    decode_first, ended, drawn = tokenizer.decoder(), False, []
    write(prompt)
    for tokens in stream_tokens(
        model,
        ids.repeat(config.num_samples, 1),
        config.max_new_tokens,
        config.temperature,
        config.top_k,
        config.top_p,
        stop_token=tokenizer.bos,
        generator=generator,
    ):
        drawn.append(tokens)
        token = int(tokens[0])
        ended = ended or token == tokenizer.bos
        if not ended:
            write(decode_first([token]))
    write(decode_first([], final=True) + separator)
    for row in torch.stack(drawn, dim=1)[1:].tolist():
        if tokenizer.bos in row:
            row = row[: row.index(tokenizer.bos)]
        write(prompt + tokenizer.decode(row) + separator)


def print_score(
    model: GPT, tokenizer: Tokenizer, ids: np.ndarray, text: str, config: SampleConfig, machine: Machine
) -> None:
    """Print how likely the model finds `text`, whose ids are `ids` (T,): a table, or with --json one JSON object."""
    rows = scoring.score(model, tokenizer, ids, config.temperature, machine.device)
    lines = [scoring.to_json(rows, text)] if config.json else scoring.table(rows, tokenizer, text)
    for line in lines:
        print(line)


def write_at_once(text: str) -> None:
    """Write `text` to stdout without waiting for the end of the line."""
    sys.stdout.write(text)
    sys.stdout.flush()


def main(argv: list[str]) -> None:
    """Write samples of the model that `argv` names, or the score of a text."""
    config, is_score = read_options(argv)
    path = find_checkpoint(config)
    state = checkpoint.load(path)
    tokenizer = find_tokenizer(state, config, path)
    ids, text = encode_text(tokenizer, config, is_score, path)
    machine = pick_machine(config)
    with memory_limits(machine):
        # The weights themselves are converted to machine.dtype: most of the time per token goes into reading them.
        model = cpu.speed_up(checkpoint.load_model(state).to(machine.device, machine.dtype))
        if is_score:
            print_score(model, tokenizer, ids, text, config, machine)
        else:
            sample(model, tokenizer, text, config, machine, write_at_once)


if __name__ == "__main__":
    run(main)

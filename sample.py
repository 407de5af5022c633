"""Write text with a trained model, or show how likely a model finds a text. It needs only a checkpoint.

    python sample.py --out_dir=out/shakespeare_char --start="ROMEO:" --num_samples=3
    python sample.py --out_dir=out/shakespeare_char --start=FILE:prompt.txt --max_new_tokens=1000
    python sample.py --ckpt=out/names/last.pt --temperature=0.5 --top_p=0.9    # nanoGPT's ckpt.pt works too
    python sample.py --out_dir=out/names --score=anna
    python sample.py --out_dir=out/names --trace=ann --layer=0 --head=0

--score prints a row for each token of a text: what the model expected, and the token's loss. The totals follow. A model
of documents scores each line and its end, or all of the text where newlines do not end a document. Any other model
scores the text as if it followed a newline.

--trace prints the numbers behind the first token that --start draws. --layer and --head add a head's attention.
"""

if __name__ == "__main__":
    import quill.start  # noqa: F401 - must be the first import

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from model import GPT
from quill import checkpoint, cpu, scoring
from quill.cli import read_args, run
from quill.data.batches import derive_seed
from quill.data.token_files import open_dataset
from quill.data.tokenizers import Tokenizer, from_json
from quill.errors import UserError, check
from quill.generation import COLDEST, stream_tokens
from quill.machine import Machine, memory_limits, pick_machine
from quill.options import Options, SampleConfig
from quill.trace import attention_steps, trace, trace_lines

ONLY_WITH = {"json": "score", "layer": "trace", "head": "trace"}  # options of one task only
WITHOUT = {"score": ("start", "trace", "num_samples", "max_new_tokens", "top_k", "top_p", "seed")}  # not taken
WITHOUT |= {"trace": ("start", "max_new_tokens"), "start": ()}
LONGEST_TEXT = 2**26  # bytes of a file in --start, --score or --trace


def read_options(argv: list[str]) -> tuple[SampleConfig, str]:
    """Read a command line into options, and the name of the one with the text. Raise a UserError for a mistake."""
    positional, flags = read_args(argv, SampleConfig, __doc__)
    if positional:
        raise UserError(f"{positional[0]}: options are written --key=value (see --help)")
    key = "score" if "score" in flags else "trace" if "trace" in flags else "start"
    for other, needed in ONLY_WITH.items():
        if flags.get(other, False) is not False and needed != key:
            raise UserError(f"--{other} is for a {needed}; give --{needed}=TEXT too")
    if wrong := [f"--{other}" for other in WITHOUT[key] if other in flags]:
        draws = "no text" if key == "score" else "one token, after its own text"
        raise UserError(f"--{key} and {', '.join(wrong)} don't go together: a {key} draws {draws}")
    defaults: Options = {"temperature": 1.0} if key == "score" else {}  # the losses are then those of training
    config = SampleConfig(**(defaults | flags))
    if key != "start" and config.temperature < COLDEST:
        raise UserError(f"--temperature={config.temperature}: must be at least {COLDEST} with --{key}")
    return config, key


def find_tokenizer(state: checkpoint.Checkpoint, config: SampleConfig, path: str | Path) -> Tokenizer:
    """Return the tokenizer of the checkpoint `state`, which was loaded from `path`.

    nanoGPT stores it with the dataset. For its checkpoints, the dataset of the same name in --data_dir is opened.
    """
    if state["tokenizer"] is not None:
        return from_json(state["tokenizer"])
    name = state["config"]["dataset"]
    check(name, f"{path}: has no tokenizer that can be read; fine-tune it on a dataset, which has one")
    try:
        tokenizer = open_dataset(config.data_dir, name).tokenizer
    except UserError as error:
        place = f"Its characters are in the dataset {name}, which can't be opened: {error}"
        raise UserError(f"{path} is a nanoGPT checkpoint. {place}") from None
    sizes = f"{path} has {state['vocab_size']} ids, but {config.data_dir}/{name} has {tokenizer.vocab_size}"
    remedy = "give the --data_dir of the dataset that it was trained on"
    check(tokenizer.vocab_size == state["vocab_size"], f"{sizes}; {remedy}")
    return tokenizer


def read_text(key: str, value: str) -> str:
    """Return the text of an option such as --start: its value, or the content of the file in --start=FILE:NAME."""
    if not value.startswith("FILE:"):
        return value
    path = Path(value.removeprefix("FILE:"))
    try:
        with open(path, "rb") as file:  # may be a pipe
            data = file.read(LONGEST_TEXT + 1)
        check(len(data) <= LONGEST_TEXT, f"--{key}={value}: longer than {LONGEST_TEXT // 2**20} MiB")
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--{key}={value}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"--{key}={value}: {error.strerror}") from None


def encode_text(tokenizer: Tokenizer, config: SampleConfig, key: str, path: Path) -> tuple[np.ndarray, str]:
    """Read the text of the option `key` and encode it. → the ids (T,) and the text, with --score those that are scored

    Raise a UserError if there is nothing to score, or if the vocabulary of the checkpoint `path` lacks a character.
    """
    value, is_score = getattr(config, key), key == "score"
    text, shown = read_text(key, value), value if value.isprintable() else repr(value)[1:-1]
    given = f"--{key}={shown if len(shown) <= 80 or value.startswith('FILE:') else shown[:79] + '…'}"
    check(not is_score or scoring.split_documents(text, tokenizer), f"{given}: there is no text to score")
    try:
        return scoring.encode(text, tokenizer) if is_score else (tokenizer.encode(text), text)
    except UserError as error:
        reason = f"the vocabulary of {path} has only the characters of its training text"
        raise UserError(f"{given}: {error}; {reason}") from None


def sampling(tokenizer: Tokenizer, prompt: str, config: SampleConfig, machine: Machine) -> tuple[torch.Tensor, Options]:
    """Return a prompt for each text to draw, (config.num_samples, T), and the options of `stream_tokens`."""
    idx = torch.from_numpy(tokenizer.prompt(prompt)).long().to(machine.device).repeat(config.num_samples, 1)
    generator = torch.Generator(machine.device).manual_seed(derive_seed("sample", config.seed))
    options = {key: getattr(config, key) for key in ("temperature", "top_k", "top_p")}
    return idx, options | {"generator": generator}


def sample(
    model: GPT, tokenizer: Tokenizer, prompt: str, config: SampleConfig, machine: Machine, write: Callable[[str], None]
) -> None:
    """Draw config.num_samples texts. `write` gets the first token by token, and the others when all are done."""
    idx, options = sampling(tokenizer, prompt, config, machine)
    separator = "\n" if tokenizer.bos_is_newline else "\n---------------\n"
    decode_first, ended, drawn = tokenizer.decoder(), False, []
    write(prompt)
    for tokens in stream_tokens(model, idx, config.max_new_tokens, stop_token=tokenizer.bos, **options):
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


def print_trace(model: GPT, tokenizer: Tokenizer, prompt: str, config: SampleConfig, machine: Machine) -> None:
    """Print how `sample` draws its first token; with --layer or --head, the attention of a head too."""
    idx, options = sampling(tokenizer, prompt, config, machine)
    steps, layer, head, shape = {}, config.layer or 0, config.head or 0, model.config
    if (config.layer, config.head) != (None, None):
        problem = f"the model has {shape.n_layer} layers, {shape.n_head} heads"
        check(layer < shape.n_layer and head < shape.n_head, f"--layer={layer} --head={head}: {problem}")
        (heads_of,) = attention_steps(model, idx[:1, -shape.block_size :], only=layer)
        steps = {name: heads[head] for name, heads in heads_of.items()}
    print(*trace_lines(trace(model, idx, **options), steps, tokenizer, config.temperature), sep="\n")


def main(argv: list[str]) -> None:
    """Write samples of the model that `argv` names, the score of a text, or the trace of a token."""
    config, key = read_options(argv)
    path = Path(config.ckpt) if config.ckpt else checkpoint.find(config.out_dir)
    state = checkpoint.load(path)
    tokenizer = find_tokenizer(state, config, path)
    ids, text = encode_text(tokenizer, config, key, path)
    machine = pick_machine(config)
    with memory_limits(machine, "use a smaller --num_samples"):
        model = cpu.for_sampling(checkpoint.load_model(state), machine)
        if key == "score":
            rows = scoring.score(model, tokenizer, ids, config.temperature, machine.device)
            lines = [scoring.to_json(rows, text)] if config.json else scoring.table(rows, tokenizer, text)
            for line in lines:  # one by one, because a table's rows are computed as they are printed
                print(line)
        elif key == "trace":
            print_trace(model, tokenizer, text, config, machine)
        else:
            sample(model, tokenizer, text, config, machine, partial(print, end="", flush=True))


if __name__ == "__main__":
    run(main)

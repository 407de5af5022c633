"""Convert a model to a folder for Hugging Face's transformers, or such a folder of GPT-2's family to a checkpoint.

    python export.py out/names --to=hf                                  # writes out/names/hf
    python export.py out/names/last.pt --to=hf --folder=names_hf --license=mit
    python export.py path/to/gpt2 --to=quill --out_dir=out/gpt2         # writes out/gpt2/best.pt

transformers opens a written folder without any code of quill's. docs/interop.md says which models can be converted.
"""

if __name__ == "__main__":
    import quill.start  # noqa: F401 - must be the first import

import json
import math
import shlex
from pathlib import Path

from quill import checkpoint, interop
from quill.cli import note, read_args, run
from quill.data.tokenizers import from_json
from quill.errors import UserError, check
from quill.files import folder_lock, replacing
from quill.options import ExportConfig, TrainConfig
from quill.run_folder import RunFolder

NOT_IN_CARD = {"data_dir", "out_dir", "overwrite", "device", "threads"}  # they belong to the machine of the run


def model_card(state: checkpoint.Checkpoint, name: str, license: str) -> str:
    """Return the model card of a checkpoint whose class in transformers is `name`."""
    config, defaults, loss = state["config"], vars(TrainConfig()), state["best_val_loss"]
    changed = [key for key, value in defaults.items() if config.get(key, value) not in (value, "resume")]
    flags = [f"--{key}={config[key]}" for key in changed if key not in NOT_IN_CARD]
    return f"""---
license: {json.dumps(license)}
library_name: transformers
---

{name}, trained with quill.

- Dataset: {config.get("dataset") or "not known"}
- Lowest validation loss: {f"{loss:.4f} nats per token" if math.isfinite(loss) else "not known"}
- Licence of the weights: {license}
- Options of the run, {state["step"]:,} steps: `{shlex.join(["python", "train.py", *flags])}`
"""


def to_hugging_face(source: Path, config: ExportConfig) -> None:
    """Write a checkpoint, or the best one of the run in the folder `source`, as a Hugging Face folder."""
    source = checkpoint.find(source) if source.is_dir() else source
    folder = Path(config.folder or source.parent / "hf")
    safetensors, state = interop.safetensors(), checkpoint.load(source)
    tokenizer = from_json(state["tokenizer"]) if state["tokenizer"] else None
    model, bos = checkpoint.load_model(state), tokenizer.bos if tokenizer else None
    values, weights = interop.to_transformers(model, bos, source)
    (name,) = values["architectures"]
    files: dict[str, dict | str | bytes] = {
        "model.safetensors": safetensors.save(weights, {"format": "pt"}),
        "README.md": model_card(state, name, config.license),
        "generation_config.json": {"bos_token_id": bos, "eos_token_id": bos, "pad_token_id": bos},
    }
    if tokenizer:
        names = ("bos_token", "eos_token", "pad_token")
        special = {} if bos is None else dict.fromkeys(names, interop.bos_name(tokenizer))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.block_size}
        files["tokenizer.json"] = interop.to_tokenizer_json(tokenizer)
        files["tokenizer_config.json"] = settings | {"clean_up_tokenization_spaces": False} | special
    else:
        note(f"note: {source} has no tokenizer, so none is written")
    files["config.json"] = values  # the last one, because nothing opens a folder without it
    with folder_lock(folder):
        if not config.overwrite and any(entry.name != ".lock" for entry in folder.iterdir()):
            raise UserError(f"{folder}: not empty; choose another --folder, or replace its files with --overwrite=True")
        with replacing(*(folder / file for file in files)) as targets:
            for target, content in zip(targets, files.values(), strict=True):
                text = json.dumps(content, ensure_ascii=False, indent=2) if isinstance(content, dict) else content
                target.write(text.encode() if isinstance(text, str) else text)
    print(f"{folder} has the model of {source}, for transformers' {name}")


def to_quill(source: Path, config: ExportConfig) -> None:
    """Write the Hugging Face folder `source` as best.pt in config.out_dir."""
    check(config.out_dir, "--to=quill: name the folder to write, as in --out_dir=out/mine")
    state, folder = checkpoint.load(source), RunFolder(config.out_dir)
    with folder_lock(folder.path):
        if (found := folder.find_run()) and not config.overwrite:
            raise UserError(f"{found[0]} is another run's: choose another --out_dir, or give --overwrite=True")
        checkpoint.save(folder.path / "best.pt", state)
        folder.clear(but="best.pt")
    print(f"{folder.path / 'best.pt'} has the model of {source}")


def main(argv: list[str]) -> None:
    """Convert what `argv` names."""
    positional, flags = read_args(argv, ExportConfig, __doc__)
    config = ExportConfig(**flags)
    check(len(positional) == 1, f"give one run, checkpoint or folder to convert, not {len(positional)} (see --help)")
    if wrong := flags.keys() & ({"out_dir"} if config.to == "hf" else {"folder", "license"}):
        raise UserError(f"--{min(wrong)} and --to={config.to} don't go together (see --help)")
    (to_hugging_face if config.to == "hf" else to_quill)(Path(positional[0]), config)


if __name__ == "__main__":
    run(main)

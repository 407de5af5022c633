"""Every option of every command: its type, default, help line and checks. No other file holds a default.

An option that nanoGPT has too keeps nanoGPT's name and default, so most of nanoGPT's commands and config files work
unchanged. These defaults differ: `device`, `dtype` and `compile` are `auto`; `eval_iters` is 0, which evaluates the
whole validation split; `lr_decay_iters` is `max_iters`; `start` is empty.

Each class below is one group of options, which `--help` prints under its heading. A command's options are the groups
that its class inherits from. Reading options from flags and config files is left to quill/cli.py.
"""

import operator
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any, Literal

from quill.errors import UserError, check

Options = dict[str, Any]  # values by the names of options

TEXTS = ("start", "score", "trace", "show")  # options that are any text, and not a name or a path
LIMITS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def option(default: Any, help: str, **limits: float) -> Any:
    """Make a dataclass field with a help line and the range of its values: any of the keys of LIMITS."""
    return field(default=default, metadata={"help": help, "limits": limits})


class Checked:
    """Base class of all groups: checks each value's range at construction, then the groups' own rules."""

    def __init_subclass__(cls, heading: str, texts: tuple[str, ...] = TEXTS) -> None:
        """heading: what `--help` prints above the options of the group. texts: the fields that take any text."""
        cls.HEADING, cls.TEXTS = heading, texts

    def __post_init__(self) -> None:
        """Raise a UserError that names the flag if a value is out of range or contradicts another one."""
        for f in fields(self):  # pyright: ignore[reportArgumentType]  # every subclass is a dataclass
            value = getattr(self, f.name)
            if isinstance(value, str):
                # File names, checkpoints and meta.json can't have these characters.
                if f.name not in self.TEXTS and ("\0" in value or value.encode(errors="replace").decode() != value):
                    raise UserError(f"--{f.name}={value}: must be UTF-8 text without null characters")
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                _check_range(f.name, value, f.metadata["limits"])
        for group in type(self).__mro__:
            if "_check_group" in vars(group):
                group._check_group(self)


def _check_range(name: str, value: float, limits: dict[str, float]) -> None:
    largest = 1e300 if isinstance(value, float) or name == "seed" else 2**63
    problem = f"--{name}={str(value)[:30]}: must be a finite number below {largest:.3g}"
    check(-largest < value < largest, problem)  # false for nan too
    for key, limit in limits.items():
        check(LIMITS[key](value, limit), f"--{name}={value}: must be {key.replace('_', ' ')} {limit}")


@dataclass(frozen=True)
class ModelConfig(Checked, heading="The model's architecture"):
    """The architecture of a GPT. A checkpoint's weights fix all of it except the dropout."""

    block_size: int = option(1024, "longest context, in tokens", at_least=1)
    n_layer: int = option(12, "number of transformer blocks; 0 with --position=none is a bigram model", at_least=0)
    n_head: int = option(12, "attention heads in each block", at_least=1)
    n_embd: int = option(768, "width of the residual stream", at_least=1)
    dropout: float = option(0.0, "dropout on embeddings, attention and residual branches", at_least=0, below=1)
    attention_dropout: float | None = option(
        None, "dropout on attention weights; empty: the value of --dropout", at_least=0, below=1
    )
    bias: bool = option(False, "use biases in Linear and LayerNorm")
    norm: Literal["layernorm", "rmsnorm", "none"] = option("layernorm", "normalisation; rmsnorm has no weights")
    norm_embedding: bool = option(False, "normalise the embeddings too, before the first block")
    norm_final: bool = option(True, "normalise before lm_head")
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu"] = option("gelu", "non-linearity of the MLP")
    position: Literal["learned", "rope", "none"] = option("learned", "position encoding")
    ngram: int = option(
        0, "add vectors for the last 2, 3, … up to this many tokens, 17 at most; 0: none", at_least=0, at_most=17
    )
    ngram_rows: int = option(16384, "rows of the n-grams' table; n-grams may share a row", at_least=1, below=10**6)
    mlp_ratio: float = option(4.0, "width of the MLP as a multiple of n_embd; 0 leaves the MLP out", at_least=0)
    residual: bool = option(True, "add the input of attention and of the MLP to its output")
    tie_weights: bool = option(True, "lm_head and the token embedding share one matrix")
    qk_norm: bool = option(False, "apply RMSNorm to queries and keys")
    init_std: float | None = option(None, "standard deviation of initial matrices; empty: as in GPT-2", above=0)

    def _check_group(self) -> None:
        check(self.n_embd % self.n_head == 0, f"--n_embd={self.n_embd} is not divisible by --n_head={self.n_head}")
        head = f"--n_embd={self.n_embd} / --n_head={self.n_head} is {self.n_embd // self.n_head}"
        if self.position == "rope" and self.n_embd // self.n_head % 2:
            raise UserError(f"--position=rope rotates pairs, so the width of a head must be even: {head}")
        check(self.ngram != 1, "--ngram=1: each token has a vector already; give 2 or more, or 0 for none")
        parts = self.ngram - 1  # of the width: one for each length of n-grams
        if self.ngram and self.n_embd % parts:
            raise UserError(f"--ngram={self.ngram}: --n_embd={self.n_embd} is not divisible by ngram - 1 = {parts}")
        width, product = self.mlp_ratio * self.n_embd, f"--mlp_ratio={self.mlp_ratio} × --n_embd={self.n_embd}"
        check(width <= 2**31, f"{product} makes the MLP too wide")
        check(width == 0 or width >= 1, f"{product} makes the width of the MLP 0")


@dataclass(frozen=True)
class RunConfig(Checked, heading="The run: where it reads, where it writes, how it starts"):
    """Where a run reads and writes, and how it starts."""

    dataset: str = option("openwebtext", "name of the folder in data_dir that holds train.bin and val.bin")
    data_dir: str = option("data", "folder of the prepared datasets")
    val_split: Literal["val", "train_tail"] = option("val", "train_tail: evaluate on train.bin's last tenth, held out")
    out_dir: str = option("out", "folder for last.pt, best.pt and metrics.csv")
    init_from: str = option("scratch", "scratch | resume | auto: resume if possible | checkpoint or GPT-2 to fine-tune")
    overwrite: bool = option(False, "let a new run replace the one in out_dir")
    seed: int = option(1337, "all random numbers are derived from this seed", at_least=0)

    def _check_group(self) -> None:
        check(self.out_dir, "--out_dir= is empty; name a folder, as in --out_dir=out/mine")


@dataclass(frozen=True)
class OptimizerConfig(Checked, heading="Optimizer, batch and learning-rate schedule"):
    """The optimizer, the batch and the learning-rate schedule."""

    optimizer: Literal["adamw", "muon"] = option("adamw", "muon: Muon for the blocks' matrices, AdamW for the rest")
    batch_size: int = option(12, "sequences in a micro-batch", at_least=1)
    gradient_accumulation_steps: int = option(40, "micro-batches in an optimizer step, over all ranks", at_least=1)
    max_iters: int = option(600_000, "number of optimizer steps", at_least=1)
    learning_rate: float = option(6e-4, "AdamW's peak learning rate", above=0)
    muon_learning_rate: float = option(0.02, "Muon's peak learning rate; it follows the same schedule", above=0)
    muon_momentum: float = option(0.95, "Muon's Nesterov momentum", at_least=0, below=1)
    weight_decay: float = option(0.1, "decoupled weight decay, on matrices only", at_least=0)
    beta1: float = option(0.9, "decay rate of AdamW's first moment", at_least=0, below=1)
    beta2: float = option(0.95, "decay rate of AdamW's second moment", at_least=0, below=1)
    grad_clip: float = option(1.0, "clip the gradient's global norm to this; 0 turns clipping off", at_least=0)
    schedule: Literal["cosine", "linear", "wsd", "constant"] = option("cosine", "learning rate after the warm-up")
    warmup_iters: int = option(2000, "steps of linear warm-up", at_least=0)
    lr_decay_iters: int | None = option(None, "step at which the rate is min_lr; empty means max_iters", at_least=1)
    min_lr: float = option(6e-5, "learning rate at the end of the decay", at_least=0)
    wsd_decay: float = option(0.2, "wsd: the rate decays in this last fraction of the steps", above=0, at_most=1)
    ema_decay: float = option(0.0, "decay of the weights' moving average in a step; 0: no average", at_least=0, below=1)

    def _check_group(self) -> None:
        if self.rows > 2**31 or self.rows * self.max_iters > 2**62:
            raise UserError(f"{self.rows_as_flags}: too many sequences in a step, or in --max_iters of them")
        if self.schedule != "constant" and self.min_lr > self.learning_rate:
            raise UserError(f"--min_lr={self.min_lr} is above --learning_rate={self.learning_rate}")

    @property
    def rows(self) -> int:
        """The number of sequences in an optimizer step, over all ranks."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def rows_as_flags(self) -> str:
        """How the flags give `rows`, for error messages."""
        return f"--batch_size={self.batch_size} × --gradient_accumulation_steps={self.gradient_accumulation_steps}"

    @property
    def decay_end(self) -> int:
        """The step at which the schedule reaches min_lr."""
        return self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters


@dataclass(frozen=True)
class ReportConfig(Checked, heading="Evaluation, logging and samples during a run"):
    """What a run evaluates, logs and prints during training."""

    eval_interval: int = option(2000, "steps between evaluations; each evaluation writes a checkpoint", at_least=1)
    eval_iters: int = option(0, "maximum batches in an evaluation; 0: the whole validation split", at_least=0)
    eval_only: bool = option(False, "evaluate, print the loss and stop")
    dry_run: bool = option(False, "describe the model, its memory and the length of an epoch, without training")
    vocab_size: int | None = option(None, "with --dry_run: the number of ids, in place of a dataset", at_least=1)
    patience: int = option(0, "stop after this many evaluations without a new best; 0 never stops", at_least=0)
    log_interval: int = option(1, "steps between log lines", at_least=1)
    eval_samples: int = option(0, "samples to print at each evaluation", at_least=0)
    final_samples: int = option(0, "samples to print at the end", at_least=0)
    sample_tokens: int = option(200, "maximum length of these samples, in tokens", at_least=1)
    sample_temperature: float = option(0.8, "temperature of these samples; 0: the likeliest token", at_least=0)
    page: bool = option(False, "write what the page of play.py shows to out_dir/page")
    tensorboard: bool = option(False, "write curves, samples, histograms and attention for TensorBoard to out_dir")

    def _check_group(self) -> None:
        if self.vocab_size is not None and not self.dry_run:
            raise UserError(f"--vocab_size={self.vocab_size} is for --dry_run only: a run has its dataset's vocabulary")
        # Checked here and not at the import, so that the error is raised before a run replaces an older one.
        if self.tensorboard and not (self.dry_run or self.eval_only) and find_spec("tensorboard") is None:
            raise UserError("--tensorboard=True needs a package: pip install tensorboard (or --tensorboard=False)")


@dataclass(frozen=True)
class SystemConfig(Checked, heading="The machine"):
    """What a command computes on."""

    device: str = option("auto", "auto | cpu | cuda | cuda:1 | mps")
    threads: int | Literal["auto"] = option(
        "auto", "CPU threads; auto: OMP_NUM_THREADS, else a resumed run's, else the free cores", at_least=1, below=4097
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = option(
        "auto", "number type of matrix products; on a CPU, float16 and int8 are for the weights, in sampling only"
    )


@dataclass(frozen=True)
class PlanConfig(ReportConfig, heading="The plan of a run on many GPUs, with --dry_run (docs/scale.md)"):
    """The GPUs that a plan is for."""

    gpus: int = option(0, "number of GPUs to plan for; 0 makes no plan", at_least=0)
    gpu_memory: float = option(80.0, "a GPU's memory in GB (1e9 bytes)", at_least=0.001, below=1e6)
    gpu_tflops: float = option(989.0, "a GPU's peak in dense bfloat16; an H100 has 989", at_least=0.001, below=1e6)
    gpu_network: float = option(50.0, "GB/s that a GPU sends; a card of 400 Gb/s has 50", at_least=0.001, below=1e6)
    days: float = option(30.0, "days that the run may take", at_least=0.001, below=1e6)

    def _check_group(self) -> None:
        if self.gpus and not self.dry_run:
            raise UserError(f"--gpus={self.gpus} is for --dry_run only: a run has as many as torchrun starts processes")
        for name in ("gpu_memory", "gpu_tflops", "gpu_network", "days"):
            value, default = getattr(self, name), getattr(PlanConfig, name)
            check(self.gpus or value == default, f"--{name}={value:g} is for a plan: add --dry_run=True and --gpus=8")


@dataclass(frozen=True)
class TrainConfig(SystemConfig, PlanConfig, OptimizerConfig, RunConfig, ModelConfig, heading="Compiling and memory"):
    """The options of train.py."""

    compile: Literal["auto", True, False] = option("auto", "use torch.compile; auto uses it on CUDA only")
    shard: bool = option(False, "split weights, gradients and optimizer state over the processes (FSDP2)")
    activation_checkpointing: bool = option(False, "save memory: compute each block again in the backward pass")

    def _check_group(self) -> None:
        check(self.dtype != "int8", "--dtype=int8 is for sample.py; train with --dtype=auto")
        for name in ("page", "tensorboard"):
            problem = f"--shard=True does not work with --{name}=True, which needs all weights on one process"
            check(not (self.shard and getattr(self, name)), problem)
        check(not self.gpus or self.dtype != "float32", "--dtype=float32: a plan is for bfloat16; leave --dtype out")

    def evaluates_after(self, step: int) -> bool:
        """Return whether an evaluation follows once `step` steps are done."""
        return step % self.eval_interval == 0 or step == self.max_iters


@dataclass(frozen=True)
class SampleConfig(SystemConfig, heading="Sampling"):
    """The options of sample.py."""

    out_dir: str = option("out", "folder of the run to sample from: its best.pt, else its last.pt")
    ckpt: str = option("", "a checkpoint file, instead of out_dir; nanoGPT's ckpt.pt works too")
    data_dir: str = option("data", "folder of the dataset that a nanoGPT checkpoint was trained on")
    start: str = option("", "the prompt, or FILE:prompt.txt; empty starts with a new line or a new document")
    num_samples: int = option(10, "number of samples", at_least=1)
    max_new_tokens: int = option(500, "maximum length of a sample, in tokens, without the prompt", at_least=1)
    temperature: float = option(0.8, "divides the logits; 0: the likeliest token; default 1 with --score", at_least=0)
    top_k: int | None = option(200, "draw from the k likeliest tokens; empty draws from all", at_least=1)
    top_p: float | None = option(None, "draw from the likeliest tokens with this total probability", above=0, at_most=1)
    seed: int = option(1337, "the same seed gives the same text", at_least=0)
    score: str = option("", "a text, or FILE:text.txt: show how likely each of its tokens is, without sampling")
    trace: str = option("", "a text, or FILE:text.txt: show how the first token after it is drawn, with all numbers")
    layer: int | None = option(None, "with --trace: show the attention of a head in this layer, from 0", at_least=0)
    head: int | None = option(None, "with --trace: show the attention of this head, from 0", at_least=0)
    json: bool = option(False, "with --score: print a JSON object instead of the table")


@dataclass(frozen=True)
class PrepareConfig(Checked, heading="Preparing a text"):
    """The options of prepare.py."""

    input: str = option("", "UTF-8 text: a file, a,b or texts/*.txt; for a known corpus, a copy that you already have")
    dataset: str = option("", "name of the folder to write in data_dir")
    data_dir: str = option("data", "folder of the prepared datasets")
    documents: str = option("none", "none | lines | blank_lines between documents | jsonl:FIELD, one object a line")
    tokenizer: str = option("char", "char | byte | bpe, trained on the text | a tokenizer.json, or a folder with one")
    vocab_size: int = option(4096, "number of ids of --tokenizer=bpe, at most", at_least=257, below=2**20)
    bins: str = option("", "instead of --input: a folder with nanoGPT's train.bin and val.bin, for --tokenizer=PATH")
    show: str = option("", "a text: show its ids and the examples it makes, with the dataset's tokenizer")

    def _check_group(self) -> None:
        kind, _, field_name = self.documents.partition(":")
        if self.documents not in ("none", "lines", "blank_lines") and (kind != "jsonl" or not field_name):
            known = "none, lines, blank_lines, or jsonl:FIELD, as in jsonl:text"
            raise UserError(f"--documents={self.documents}: is one of {known}")
        if self.vocab_size != PrepareConfig.vocab_size and self.tokenizer != "bpe":
            raise UserError(f"--vocab_size={self.vocab_size}: is for --tokenizer=bpe; others have a vocabulary already")


@dataclass(frozen=True)
class ExportConfig(Checked, heading="Converting a model"):
    """The options of export.py."""

    to: Literal["hf", "quill"] = option("hf", "hf: write a folder for transformers; quill: write a checkpoint")
    folder: str = option("", "with --to=hf: the folder to write; empty means hf in the run's folder")
    out_dir: str = option("", "with --to=quill: the folder to write best.pt to")
    license: str = option("unknown", "with --to=hf: the licence of the weights in the model card, such as mit")
    overwrite: bool = option(False, "replace what the folder has")


@dataclass(frozen=True)
class PlayConfig(Checked, heading="The page"):
    """The options of play.py."""

    out_dir: str = option("", "the run that the page opens with; the runs beside it are listed too")
    data_dir: str = option("data", "folder of the prepared datasets")
    port: int = option(8000, "port on 127.0.0.1; 0 takes a free one", at_least=0, below=65536)


@dataclass(frozen=True)
class BenchConfig(SystemConfig, heading="Benchmarks"):
    """The options of `python -m bench`."""

    peer: str = option("", "folder of nanoGPT, to measure it too; empty measures quill alone (replay needs nanoGPT)")
    pairs: int = option(5, "how many times quill and nanoGPT each run; they alternate", at_least=1)
    seeds: int = option(3, "for `bench compare` and `bench ladder`: number of seeds for each config", at_least=1)
    jobs: int = option(1, "for `bench compare`: number of runs at a time", at_least=1, at_most=100)
    minutes: float = option(1e6, "for `bench compare`: no run is started after this time", above=0)
    target: float = option(0.0, "for `bench loss`: say whether the mean loss is at most this; 0: don't", at_least=0)
    recipe: str = option("config/shakespeare_char_cpu.py", "for `bench loss` and `bench faults`: the config to run")
    quick: bool = option(
        False, "for `bench faults`: a few cases of each campaign; for `bench growth`: two sizes of each series"
    )
    gigabytes: int = option(1, "for `bench growth`: the largest text; the disk needs three times as much", at_least=1)
    data_dir: str = option("data", "folder of the prepared datasets")
    out_dir: str = option("out/bench", "folder for the JSON and for the runs of compare and ladder")


# Options of nanoGPT that quill does not have, and the notices that it prints for them.
NANOGPT_NOTICES: dict[type[Checked], dict[str, str]] = {
    TrainConfig: {
        "wandb_log": "not used: a run's curves are in out_dir/metrics.csv, or see --tensorboard",
        "wandb_project": "not used: a run is named by --out_dir",
        "wandb_run_name": "not used: a run is named by --out_dir",
        "always_save_checkpoint": "not used: every evaluation writes last.pt, and best.pt keeps the best",
        "backend": "not used: nccl on CUDA, gloo on CPU",
        "decay_lr": "use --schedule: True is cosine, False is constant without warm-up",
    },
    SampleConfig: {
        "init_from": "--out_dir or --ckpt names the checkpoint, or the folder of GPT-2's weights",
        "compile": "not used: sampling is uncompiled, with a cache of keys and values",
    },
}
# The values of these options that are accepted, and the options that each sets. The others have no effect.
NANOGPT_VALUES: dict[str, dict[Any, Options]] = {
    "decay_lr": {True: {"schedule": "cosine"}, False: {"schedule": "constant", "warmup_iters": 0}},
    "init_from": {"resume": {}},
}

"""The options of each command: type, default, one-line help and checks. The only place with defaults.

Keys that nanoGPT has keep nanoGPT's names and defaults, so that its commands and config files mean the same here.
Exceptions, each because the machine can be asked: `device`, `dtype` and `compile` are `auto`; and `eval_iters` is 0,
because a validation pass is exact unless it is capped.

Every class below is one group of options; a command's options are its groups joined by inheritance.
"""

from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any, Literal

from quill.errors import UserError


def option(default, help, at_least=None, above=None, below=None):
    """A dataclass field with its help line and its range (`at_least` is inclusive, `above` and `below` are not)."""
    return field(default=default, metadata={"help": help, "at_least": at_least, "above": above, "below": below})


class Checked:
    """Checks ranges at construction, then whatever relates several fields (`check`, looked up on every group)."""

    def __post_init__(self):
        for f in fields(self):
            value, limits = getattr(self, f.name), f.metadata
            if value is None or isinstance(value, (str, bool)):
                continue
            if not -1e300 < value < 1e300:  # nan is neither; an int may be too large for a float
                raise UserError(f"--{f.name}={str(value)[:30]}: must be a finite number of a sensible size")
            if isinstance(value, int) and value >= 2**63 and f.name != "seed":
                raise UserError(f"--{f.name}={str(value)[:30]}: must be a finite number of a sensible size")
            if limits["at_least"] is not None and value < limits["at_least"]:
                raise UserError(f"--{f.name}={value}: must be at least {limits['at_least']}")
            if limits["above"] is not None and value <= limits["above"]:
                raise UserError(f"--{f.name}={value}: must be above {limits['above']}")
            if limits["below"] is not None and value >= limits["below"]:
                raise UserError(f"--{f.name}={value}: must be below {limits['below']}")
        for group in type(self).__mro__:
            if "check" in vars(group):
                group.check(self)


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The model's shape"""

    block_size: int = option(1024, "longest context, in tokens", at_least=1)
    n_layer: int = option(12, "transformer blocks; 0 with --position=none is a bigram model", at_least=0)
    n_head: int = option(12, "attention heads in a block", at_least=1)
    n_embd: int = option(768, "width of the residual stream", at_least=1)
    dropout: float = option(0.0, "dropout on embeddings, attention and residual branches", at_least=0, below=1)
    attention_dropout: float | None = option(
        None, "dropout on attention weights; empty is --dropout's", at_least=0, below=1
    )
    bias: bool = option(False, "bias in Linear and LayerNorm")
    norm: Literal["layernorm", "rmsnorm", "none"] = option("layernorm", "normalisation; rmsnorm has no weights")
    norm_embedding: bool = option(False, "normalise the embeddings too, before the first block")
    norm_final: bool = option(True, "normalise before lm_head")
    activation: Literal["gelu", "relu", "relu2", "swiglu"] = option("gelu", "the MLP's non-linearity")
    position: Literal["learned", "rope", "none"] = option("learned", "how the model knows a token's place")
    mlp_ratio: float = option(4.0, "the MLP's hidden width as a multiple of n_embd; 0 leaves the MLP out", at_least=0)
    residual: bool = option(True, "add a block's input to its output")
    tie_weights: bool = option(True, "lm_head shares the token embedding's matrix")
    qk_norm: bool = option(False, "RMSNorm on queries and keys")
    init_std: float | None = option(None, "every matrix begins as N(0, init_std); empty is GPT-2's way", above=0)

    def check(self):
        if self.n_embd % self.n_head:
            raise UserError(f"--n_embd={self.n_embd} is not divisible by --n_head={self.n_head}")
        if self.position == "rope" and self.n_embd // self.n_head % 2:
            raise UserError(
                f"--position=rope turns pairs, so a head's width must be even: --n_embd={self.n_embd} / "
                f"--n_head={self.n_head} is {self.n_embd // self.n_head}"
            )
        if self.mlp_ratio * self.n_embd > 2**31:
            raise UserError(f"--mlp_ratio={self.mlp_ratio} of --n_embd={self.n_embd} is too wide")
        if self.mlp_ratio and int(self.mlp_ratio * self.n_embd) < 1:
            raise UserError(f"--mlp_ratio={self.mlp_ratio} of --n_embd={self.n_embd} leaves the MLP no width")


@dataclass(frozen=True)
class RunConfig(Checked):
    """The run: where it reads, where it writes, how it starts"""

    dataset: str = option("openwebtext", "name of the folder in data_dir that holds train.bin and val.bin")
    data_dir: str = option("data", "folder of the prepared datasets")
    out_dir: str = option("out", "folder for last.pt, best.pt and metrics.csv")
    init_from: str = option(
        "scratch", "scratch | resume (out_dir's last.pt) | auto (resume if there is one) | a checkpoint to fine-tune"
    )
    overwrite: bool = option(False, "let a fresh run replace the one that out_dir holds")
    seed: int = option(1337, "all randomness derives from (seed, step, rank)", at_least=0)

    def check(self):
        if not self.out_dir:
            raise UserError("--out_dir= is empty; name a folder, as in --out_dir=out/mine")


@dataclass(frozen=True)
class OptimizerConfig(Checked):
    """Optimizer, batch and learning-rate schedule"""

    optimizer: Literal["adamw", "muon"] = option("adamw", "muon: Muon for the blocks' matrices, AdamW for the rest")
    batch_size: int = option(12, "sequences in a micro-batch", at_least=1)
    gradient_accumulation_steps: int = option(40, "micro-batches in an optimizer step, over all ranks", at_least=1)
    max_iters: int = option(600_000, "optimizer steps", at_least=1)
    learning_rate: float = option(6e-4, "AdamW's peak learning rate", above=0)
    muon_learning_rate: float = option(0.02, "Muon's peak learning rate; follows the same schedule", above=0)
    muon_momentum: float = option(0.95, "Muon's Nesterov momentum", at_least=0, below=1)
    weight_decay: float = option(0.1, "decoupled weight decay, on matrices only", at_least=0)
    beta1: float = option(0.9, "AdamW's first moment decay", at_least=0, below=1)
    beta2: float = option(0.95, "AdamW's second moment decay", at_least=0, below=1)
    grad_clip: float = option(1.0, "clip the gradient's global norm to this; 0 turns clipping off", at_least=0)
    schedule: Literal["cosine", "linear", "wsd", "constant"] = option("cosine", "learning rate after the warm-up")
    warmup_iters: int = option(2000, "steps of linear warm-up", at_least=0)
    lr_decay_iters: int | None = option(None, "step at which min_lr is reached; max_iters unless set", at_least=1)
    min_lr: float = option(6e-5, "learning rate at the end of the decay", at_least=0)
    wsd_decay: float = option(0.2, "wsd: the last fraction of the steps, in which the rate decays", above=0)
    ema_decay: float = option(0.0, "average the weights, w = d w + (1 - d) new; 0 turns it off", at_least=0, below=1)

    def check(self):
        if self.schedule != "constant" and self.min_lr > self.learning_rate:
            raise UserError(f"--min_lr={self.min_lr} is above --learning_rate={self.learning_rate}")
        if self.wsd_decay > 1:
            raise UserError(f"--wsd_decay={self.wsd_decay}: must be at most 1")

    @property
    def decay_end(self) -> int:
        """The step at which the schedule reaches min_lr."""
        return self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters


@dataclass(frozen=True)
class ReportConfig(Checked):
    """Evaluation, logging and samples on the way"""

    eval_interval: int = option(2000, "steps between evaluations; each writes a checkpoint", at_least=1)
    eval_iters: int = option(0, "cap on an evaluation's batches; 0 is the whole validation split, exactly", at_least=0)
    eval_only: bool = option(False, "evaluate, print, and stop")
    dry_run: bool = option(False, "print the model, its memory and the length of an epoch, and train nothing")
    patience: int = option(0, "stop after this many evaluations without a new best; 0 never", at_least=0)
    log_interval: int = option(1, "steps between readings of the loss", at_least=1)
    eval_samples: int = option(0, "samples to print at each evaluation", at_least=0)
    final_samples: int = option(0, "samples to print at the end", at_least=0)
    sample_tokens: int = option(200, "longest such sample, in tokens", at_least=1)
    sample_temperature: float = option(0.8, "their temperature; 0 always takes the likeliest token", at_least=0)
    tensorboard: bool = option(False, "curves, samples, histograms and attention for TensorBoard, in out_dir")

    def check(self):
        # Here, and not where it is imported: before a run takes the place of another one.
        if self.tensorboard and not (self.dry_run or self.eval_only) and find_spec("tensorboard") is None:
            raise UserError("--tensorboard=True needs a package: pip install tensorboard (or --tensorboard=False)")


@dataclass(frozen=True)
class SystemConfig(Checked):
    """The machine"""

    device: str = option("auto", "auto | cpu | cuda | cuda:1 | mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "what matrix products are computed in")


@dataclass(frozen=True)
class TrainConfig(SystemConfig, ReportConfig, OptimizerConfig, RunConfig, ModelConfig):
    """Compiling"""

    compile: Literal["auto", True, False] = option("auto", "torch.compile; auto uses it on CUDA, where it pays")

    def evaluates_after(self, step):
        """Whether an evaluation follows when `step` steps are done."""
        return step % self.eval_interval == 0 or step == self.max_iters


@dataclass(frozen=True)
class SampleConfig(SystemConfig):
    """Sampling"""

    out_dir: str = option("out", "the run to sample from: its best.pt, else its last.pt")
    ckpt: str = option("", "a checkpoint file instead of out_dir; nanoGPT's ckpt.pt works too")
    data_dir: str = option("data", "where a nanoGPT checkpoint's dataset was prepared")
    start: str = option("", "the prompt, or FILE:prompt.txt; empty is a new line or a new document")
    num_samples: int = option(10, "samples to draw", at_least=1)
    max_new_tokens: int = option(500, "longest sample, in tokens", at_least=1)
    temperature: float = option(
        0.8, "divides the logits; 0 always takes the likeliest token; 1 with --score, unless it is given", at_least=0
    )
    top_k: int | None = option(200, "draw from the k likeliest tokens; empty draws from all", at_least=1)
    top_p: float | None = option(None, "draw from the likeliest tokens that hold this much probability", above=0)
    seed: int = option(1337, "the same seed gives the same text", at_least=0)
    score: str = option("", "a text, or FILE:text.txt: show how likely each of its tokens is, and sample nothing")
    json: bool = option(False, "with --score: a JSON object in place of the table")

    def check(self):
        if self.top_p is not None and self.top_p > 1:
            raise UserError(f"--top_p={self.top_p}: a probability is at most 1")


@dataclass(frozen=True)
class PrepareConfig(Checked):
    """Preparing a text"""

    input: str = option("", "a UTF-8 text file; for a known corpus, a copy of it that you already have")
    dataset: str = option("", "name of the folder to write in data_dir")
    data_dir: str = option("data", "folder of the prepared datasets")
    documents: Literal["none", "lines"] = option("none", "lines: every line is a document of its own, as in names")
    tokenizer: Literal["char", "byte"] = option("char", "what a token is: a character of the text, or a UTF-8 byte")


@dataclass(frozen=True)
class BenchConfig(SystemConfig):
    """Benchmarks"""

    peer: str = option("", "a checkout of nanoGPT to measure beside ours; empty measures ours alone (replay needs one)")
    pairs: int = option(5, "runs of each, in turn", at_least=1)
    seeds: int = option(3, "compare, ladder: seeds for each config", at_least=1)
    recipe: str = option("config/shakespeare_char_cpu.py", "loss: the config to run")
    data_dir: str = option("data", "folder of the prepared datasets")
    out_dir: str = option("out/bench", "folder for the JSON and for the runs of compare and ladder")


# nanoGPT's keys that have no meaning of their own here: what to say, and what they stand for now.
# A value in `becomes` keeps the old meaning exactly; a key without one changes nothing.
@dataclass(frozen=True)
class Retired:
    notice: str
    becomes: dict[Any, dict[str, Any]] = field(default_factory=dict)
    only: str | None = None  # the one value that still makes sense


RETIRED = {
    TrainConfig: {
        "wandb_log": Retired("not used: a run's curves are in out_dir/metrics.csv, or see --tensorboard"),
        "wandb_project": Retired("not used: a run is named by --out_dir"),
        "wandb_run_name": Retired("not used: a run is named by --out_dir"),
        "always_save_checkpoint": Retired("not used: every evaluation writes last.pt, and best.pt keeps the best"),
        "backend": Retired("not used: nccl on CUDA, gloo on CPU"),
        "decay_lr": Retired(
            "use --schedule: True is cosine, False is constant without warm-up",
            {True: {"schedule": "cosine"}, False: {"schedule": "constant", "warmup_iters": 0}},
        ),
    },
    SampleConfig: {
        "init_from": Retired("--out_dir or --ckpt names the checkpoint; GPT-2's weights are not read", only="resume"),
        "compile": Retired("not used: sampling is uncompiled, with a cache of keys and values"),
    },
}

"""Compare the speed of generation of quill, nanoGPT and transformers, in turn, with random weights."""

from functools import partial
from importlib.util import find_spec

from bench.measure import Line, in_turn, on_gpu, peer_machine_options, program, report
from bench.shapes import GPT2, GPT2_IDS, SHAKESPEARE_10M
from quill.options import BenchConfig


def generate(config: BenchConfig) -> list[Line]:
    """Measure tokens per second of `generate` within the block: random weights, temperature 0.8, top-k 50.

    nanoGPT draws one sample at a time, so its batch is always 1. Where transformers is installed and a peer is given,
    single samples are compared with transformers' too.
    """
    lines = []
    small = {key: SHAKESPEARE_10M[key] for key in GPT2}
    many = 64 if on_gpu(config) else 16
    for name, shape, vocab_size, batch_size, tokens in (
        ("10.7M, one sample", small, 65, 1, 250),
        (f"10.7M, {many} samples", small, 65, many, 250),
        ("124M, one sample", GPT2, GPT2_IDS, 1, 100),
    ):
        options = {"shape": shape, "vocab_size": vocab_size, "tokens": tokens} | peer_machine_options(config)
        ours = partial(program, "generate", model="quill", batch_size=batch_size, **options)
        theirs = partial(program, "generate", model="nanogpt", peer=config.peer, batch_size=1, **options)
        figures = in_turn(config.pairs, ours, theirs if config.peer else None)
        lines.append(report(f"generation, {name} (peer one at a time)", "tokens/s", *figures, more_is_better=True))
        if config.peer and batch_size == 1 and find_spec("transformers"):
            theirs = partial(program, "generate", model="transformers", batch_size=1, **options)
            figures = in_turn(config.pairs, ours, theirs)
            lines.append(
                report(f"generation, {name}, with transformers as the peer", "tokens/s", *figures, more_is_better=True)
            )
    return lines

"""A GPT in plain Python: the model, its gradients and its training, one number at a time.

    python docs/scalar_gpt.py                                       # names, 1,000 steps
    python docs/scalar_gpt.py --text=my.txt --steps=200 --seed=1    # a text with one document a line

The model is that of config/microgpt.py. Training it here takes about a minute.

Shapes are those of nested lists: T tokens, C = N_EMBD, D = C / N_HEAD, V = vocabulary size.
References: GPT-2 (Radford et al. 2019), RMSNorm (Zhang & Sennrich 2019), Adam (Kingma & Ba 2015).
"""

import argparse
import math
import random
from pathlib import Path

N_LAYER, N_HEAD, N_EMBD, BLOCK_SIZE = 1, 4, 16, 16
MAX_ITERS, LEARNING_RATE, BETA1, BETA2, EPS = 1000, 0.01, 0.85, 0.99, 1e-8


class Value:
    """A number (data) that remembers what it was computed from (children).

    `local_grads` has d self / d child for each child; `grad` is d loss / d self, once `backward` has run.
    """

    __slots__ = ("data", "grad", "children", "local_grads")

    def __init__(self, data, children=(), local_grads=()):
        self.data, self.grad, self.children, self.local_grads = data, 0.0, children, local_grads

    def __add__(self, other):
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data + other.data, (self, other), (1.0, 1.0))

    def __mul__(self, other):
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data * other.data, (self, other), (other.data, self.data))

    def __pow__(self, exponent):  # a plain number
        return Value(self.data**exponent, (self,), (exponent * self.data ** (exponent - 1),))

    def __truediv__(self, other):
        return self * other**-1

    __radd__, __rmul__ = __add__, __mul__  # number + Value (as in `sum`), number * Value

    def exp(self):
        return Value(math.exp(self.data), (self,), (math.exp(self.data),))

    def log(self):
        return Value(math.log(self.data), (self,), (1 / self.data,))

    def relu(self):
        return Value(max(0.0, self.data), (self,), (float(self.data > 0),))

    def backward(self):
        """Add d self / d x to `x.grad`, for every x that self was computed from. Call it once for each graph.

        This is the chain rule, applied from the result backwards. A Value passes its grad on to its children only when
        its own grad is complete, which means that every Value computed from it was visited first. The order is found
        with a stack instead of recursion, because Python limits the depth of recursion.
        """
        order, seen, stack = [], set(), [(self, False)]
        while stack:
            value, children_done = stack.pop()
            if children_done:
                order.append(value)
            elif value not in seen:
                seen.add(value)
                stack.append((value, True))
                stack.extend((child, False) for child in value.children)
        self.grad = 1.0
        for value in reversed(order):
            for child, local_grad in zip(value.children, value.local_grads, strict=True):
                child.grad += value.grad * local_grad


def dot(x, y):
    """Σ x_i y_i as one Value. With + and * it would be two Values for each term, and a GPT is mostly dot products."""
    a, b = [value.data for value in x], [value.data for value in y]
    return Value(sum(p * q for p, q in zip(a, b, strict=True)), (*x, *y), (*b, *a))


class Tokenizer:
    """A token is a character; its id is its place in the sorted characters. One more id, BOS, separates documents."""

    def __init__(self, documents):
        self.chars = sorted(set("".join(documents)))
        self.bos = len(self.chars)

    def encode(self, document):
        return [self.bos, *map(self.chars.index, document), self.bos]


def init_weights(vocab_size, rng, std=0.08):
    """Return {GPT-2's name: matrix}. A matrix is a list of rows of Values, drawn from N(0, std)."""
    C = N_EMBD
    shapes = {"transformer.wte": (vocab_size, C), "transformer.wpe": (BLOCK_SIZE, C), "lm_head": (vocab_size, C)}
    for block in (f"transformer.h.{layer}" for layer in range(N_LAYER)):
        shapes |= {f"{block}.attn.c_attn": (3 * C, C), f"{block}.attn.c_proj": (C, C)}
        shapes |= {f"{block}.mlp.c_fc": (4 * C, C), f"{block}.mlp.c_proj": (C, 4 * C)}
    return {
        f"{name}.weight": [[Value(rng.gauss(0, std)) for _ in range(columns)] for _ in range(rows)]
        for name, (rows, columns) in shapes.items()
    }


def add(x, y):
    return [a + b for a, b in zip(x, y, strict=True)]


def linear(x, matrix):
    """Multiply `matrix` (out, in) by `x` (in,). → (out,)"""
    return [dot(row, x) for row in matrix]


def rms_norm(x):
    scale = (dot(x, x) / len(x) + 1e-5) ** -0.5
    return [value * scale for value in x]


def softmax(logits):
    largest = max(z.data for z in logits)  # subtracting it leaves softmax unchanged, and exp can't overflow
    exps = [(z + -largest).exp() for z in logits]
    inverse = sum(exps) ** -1
    return [e * inverse for e in exps]


def attention(x, weights, name):
    """Each token gathers values from itself and the tokens before it, once for each head. `x` (T, C) → (T, C)"""
    C, D = N_EMBD, N_EMBD // N_HEAD
    qkv = [linear(token, weights[f"{name}.c_attn.weight"]) for token in x]  # (T, 3C): query, key, value
    out = []
    for t in range(len(x)):
        gathered = []
        for i in range(0, C, D):  # i is the first column of a head
            keys = [row[C + i : C + i + D] for row in qkv[: t + 1]]
            values = [row[2 * C + i : 2 * C + i + D] for row in qkv[: t + 1]]
            probs = softmax([dot(qkv[t][i : i + D], key) * D**-0.5 for key in keys])  # the weight of each token
            gathered += [dot(probs, column) for column in zip(*values, strict=True)]
        out.append(linear(gathered, weights[f"{name}.c_proj.weight"]))
    return out


def forward(ids, weights):
    """`ids` (T,), T ≤ BLOCK_SIZE → logits (T, V). Row t predicts token t + 1 and depends on tokens 0 to t only."""
    x = [add(weights["transformer.wte.weight"][i], weights["transformer.wpe.weight"][t]) for t, i in enumerate(ids)]
    x = [rms_norm(token) for token in x]  # (T, C)
    for block in (f"transformer.h.{layer}" for layer in range(N_LAYER)):
        gathered = attention([rms_norm(token) for token in x], weights, f"{block}.attn")
        x = [add(token, y) for token, y in zip(x, gathered, strict=True)]
        for t, token in enumerate(x):  # the MLP, applied to each token separately
            hidden = [h.relu() for h in linear(rms_norm(token), weights[f"{block}.mlp.c_fc.weight"])]  # (4C,)
            x[t] = add(token, linear(hidden, weights[f"{block}.mlp.c_proj.weight"]))
    return [linear(token, weights["lm_head.weight"]) for token in x]


def cross_entropy(ids, weights):
    """Mean loss in nats. Of `BOS a b c BOS`, `BOS a b c` predicts `a b c BOS`; at most BLOCK_SIZE tokens are used."""
    ids = ids[: BLOCK_SIZE + 1]
    rows = zip(forward(ids[:-1], weights), ids[1:], strict=True)
    return sum((softmax(logits)[target].log() for logits, target in rows), Value(0.0)) / (1 - len(ids))


def adam_step(parameters, m, v, step, steps=MAX_ITERS):
    """Update `parameters` (N,) from their grads. `m`, `v` (N,) are running means of grad and grad²."""
    lr = LEARNING_RATE * (1 - step / steps)  # linear decay to 0; step counts from 0
    for i, p in enumerate(parameters):
        m[i] = BETA1 * m[i] + (1 - BETA1) * p.grad
        v[i] = BETA2 * v[i] + (1 - BETA2) * p.grad**2
        # Both means start at 0, so they are too small in the first steps. Dividing corrects that.
        mean, square = m[i] / (1 - BETA1 ** (step + 1)), v[i] / (1 - BETA2 ** (step + 1))
        p.data -= lr * mean / (math.sqrt(square) + EPS)
        p.grad = 0.0


def sample(weights, tokenizer, rng, temperature=0.5):
    """Draw a document token by token, until BOS or until it has BLOCK_SIZE tokens. → text"""
    ids = [tokenizer.bos]
    while len(ids) <= BLOCK_SIZE and (len(ids) == 1 or ids[-1] != tokenizer.bos):
        probs = softmax([z / temperature for z in forward(ids, weights)[-1]])
        ids += rng.choices(range(len(probs)), [p.data for p in probs])
    return "".join(tokenizer.chars[i] for i in ids if i != tokenizer.bos)


def main(text, steps, seed):
    documents = text.read().strip().split("\n")
    tokenizer, rng = Tokenizer(documents), random.Random(seed)
    rng.shuffle(documents)
    weights = init_weights(tokenizer.bos + 1, rng)
    parameters = [value for matrix in weights.values() for row in matrix for value in row]
    m, v, losses = [0.0] * len(parameters), [0.0] * len(parameters), []
    print(f"{len(parameters):,} parameters, {len(documents):,} documents")
    for step in range(steps):
        loss = cross_entropy(tokenizer.encode(documents[step % len(documents)]), weights)
        loss.backward()
        adam_step(parameters, m, v, step, steps)
        losses = [*losses[-99:], loss.data]  # of 100 steps
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"step {step + 1}: mean loss of {len(losses)} steps {sum(losses) / len(losses):.4f}", flush=True)
    print(*(sample(weights, tokenizer, rng) for _ in range(20)), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    names = str(Path(__file__).parent.parent / "data" / "names.txt")
    parser.add_argument("--text", type=argparse.FileType(encoding="utf-8", errors="replace"), default=names)
    parser.add_argument("--steps", type=int, default=MAX_ITERS)
    parser.add_argument("--seed", type=int, default=1337)
    main(**vars(parser.parse_args()))

"""Six weights learn to write "ann.": all of training in plain Python, one step after the other.

    python docs/six_weights.py

A token is a character. Each of the six tokens has a weight: the larger it is, the more often the token is drawn.
docs/six_weights.svg is the graph of step 4.
"""

import math

TOKENS, WEIGHTS, NUDGE = "ailen.", [0.62, 0.45, 0.85, 0.67, 0.17, 0.53], 0.01
TARGETS = [TOKENS.index(char) for char in "ann."]  # 0, 4, 4, 5: what the model should write


def probabilities(weights):
    """Each weight over the sum of all. The results sum up to 1."""
    return [w / sum(weights) for w in weights]


def pick_index(probs, number):
    """Draw a token with a random number from 0 to 1: the first token whose running sum is above the number."""
    running = 0.0
    for i, p in enumerate(probs):
        running += p
        if number < running:
            return i
    return len(probs) - 1  # the last sum is 1, but rounding can make it a little less


def mean_loss(weights, loss=lambda p: 1 - p):
    """How bad the weights are: the mean of loss(p), where p is the probability of each target."""
    probs = probabilities(weights)
    return sum(loss(probs[i]) for i in TARGETS) / len(TARGETS)


def nudged_loss(weights, i, nudge=NUDGE):
    """The loss when weight number i is a little larger."""
    return mean_loss([w + nudge * (i == j) for j, w in enumerate(weights)])


def update(weights, rate=0.1):
    """Measure each slope, the change of the loss over the change of the weight, and move each weight against it."""
    slopes = [(nudged_loss(weights, i) - mean_loss(weights)) / NUDGE for i in range(len(weights))]
    return [w - rate * slope for w, slope in zip(weights, slopes, strict=True)], slopes


class Value:
    """A number that remembers which Values it was computed from (sources), and its slope for each of them."""

    def __init__(self, name, data, sources=(), local_slopes=()):
        self.name, self.data, self.sources, self.local_slopes = name, data, sources, local_slopes
        self.slope = 0.0  # how fast the result changes with this Value; `backward` computes it

    def graph(self):
        """All that this Value was computed from, each after its sources, and the Value itself."""
        order = []
        for source in self.sources:
            order += [value for value in source.graph() if value not in order]
        return [*order, self]

    def backward(self):
        """The chain rule, from the result back to the weights: multiply the slopes along a path, add up the paths."""
        self.slope = 1.0
        for value in reversed(self.graph()):
            for source, local_slope in zip(value.sources, value.local_slopes, strict=True):
                source.slope += value.slope * local_slope


def loss_graph(weights):
    """The loss of `mean_loss`, as a Value made of Values. → the loss, the six weights"""
    ws = [Value(token, w) for token, w in zip(TOKENS, weights, strict=True)]
    total, probs = Value("sum", sum(weights), ws, [1] * len(ws)), {}
    for i in TARGETS:  # p = w / sum has the slopes 1 / sum and -w / sum²
        local_slopes = 1 / total.data, -ws[i].data / total.data**2
        probs[i] = Value(f"p({TOKENS[i]})", ws[i].data / total.data, (ws[i], total), local_slopes)
    return Value("loss", mean_loss(weights), [probs[i] for i in TARGETS], [-1 / len(TARGETS)] * len(TARGETS)), ws


def lesson():
    result, ws = loss_graph(WEIGHTS)
    result.backward()
    probs, (weights, slopes) = probabilities(WEIGHTS), update(WEIGHTS)
    print("1. A die gives each token 1/6 = 0.167. Here each token gets its weight over the sum of the weights:")
    print(*(f"   {token} {w:.2f} → {p:.3f}" for token, w, p in zip(TOKENS, WEIGHTS, probs, strict=True)), sep="\n")
    die, drawn = (TOKENS[pick_index(each, 0.53)] for each in ([1 / 6] * 6, probs))
    print(f"2. The random number 0.53 draws {die} with the die, and {drawn} with the weights.")
    logs = mean_loss(WEIGHTS, lambda p: -math.log(p))
    print(f"3. The loss on ann. is the mean of 1 - p: {mean_loss(WEIGHTS):.4f}. A GPT's is that of -log p: {logs:.4f}.")
    print("4. Each weight, the loss when it is 0.01 larger, the slope, Value's slope, and the weight after a step:")
    for i, value in enumerate(ws):
        slope = f"{nudged_loss(WEIGHTS, i):.4f}  {slopes[i]:+.4f}  {value.slope:+.4f}"
        print(f"   {value.name}  {value.data:.2f}  {slope}  {weights[i]:.3f}")
    print(f"5. The loss after one step: {mean_loss(weights):.4f}")
    for _ in range(74):
        weights, _ = update(weights)
    print(f"   after 75 steps: {mean_loss(weights):.4f}, with the weights", *(f"{w:.2f}" for w in weights))


if __name__ == "__main__":
    lesson()

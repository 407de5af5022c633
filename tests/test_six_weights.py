"""docs/six_weights.py: every number of the lesson, Value against slopes, and the picture against the program."""

import math
import xml.etree.ElementTree
from pathlib import Path

import pytest
import six_weights
from six_weights import TARGETS, TOKENS, WEIGHTS

DOCS = Path(six_weights.__file__).parent


def test_the_table_by_hand():
    """The table that the lesson reproduces: losses, slopes and weights, rounded as they are there."""
    assert six_weights.mean_loss(WEIGHTS) == pytest.approx(0.8868, abs=5e-5)
    nudged = [six_weights.nudged_loss(WEIGHTS, i) for i in range(6)]
    assert [f"{loss:.4f}" for loss in nudged] == ["0.8864", "0.8871", "0.8871", "0.8871", "0.8856", "0.8864"]
    weights, slopes = six_weights.update(WEIGHTS)
    assert [f"{slope:+.2f}" for slope in slopes] == ["-0.04", "+0.03", "+0.03", "+0.03", "-0.12", "-0.04"]
    assert [f"{w:.3f}" for w in weights] == ["0.624", "0.447", "0.847", "0.667", "0.182", "0.534"]
    assert six_weights.mean_loss(weights) == pytest.approx(0.8847, abs=5e-5)


def test_a_weight_falls_below_0_at_step_80():
    """As docs/tour.md says: this is why a GPT has a softmax."""
    weights = WEIGHTS
    for step in range(1, 81):
        weights, _ = six_weights.update(weights)
        assert (min(weights) < 0) == (step == 80)
    assert weights.index(min(weights)) == TOKENS.index("i")


def test_probabilities_and_losses():
    """Against the sum 3.29 of the weights, and logarithms of the four targets a, n, n and the full stop."""
    probs = six_weights.probabilities(WEIGHTS)
    assert probs == pytest.approx([w / 3.29 for w in WEIGHTS]) and sum(probs) == pytest.approx(1)
    logs = -sum(math.log(w / 3.29) for w in (0.62, 0.17, 0.17, 0.53)) / 4
    assert six_weights.mean_loss(WEIGHTS, lambda p: -math.log(p)) == pytest.approx(logs)


@pytest.mark.parametrize(
    "number, die, weights", [(0.0, 0, 0), (0.53, 3, 2), (0.166, 0, 0), (0.167, 1, 0), (0.84, 5, 5), (0.999, 5, 5)]
)
def test_pick_index(number, die, weights):
    """0.53 is in the fourth sixth of a die, so its index is 3; of the weights' running sums, 0.584 is above it."""
    assert six_weights.pick_index([1 / 6] * 6, number) == die
    assert six_weights.pick_index(six_weights.probabilities(WEIGHTS), number) == weights
    assert six_weights.pick_index([0.1] * 3, number) <= 2


def test_value_finds_the_slopes():
    """Central differences of 1e-6 give each slope to about 1e-10; n is a target twice, and i, l, e are none."""
    result, ws = six_weights.loss_graph(WEIGHTS)
    result.backward()
    assert result.data == six_weights.mean_loss(WEIGHTS)
    step = 1e-6
    for i, w in enumerate(ws):
        ends = [six_weights.nudged_loss(WEIGHTS, i, sign * step) for sign in (1, -1)]
        assert w.slope == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-9)
        assert w.slope == pytest.approx((1.49 - TARGETS.count(i) * 3.29) / 3.29**2 / 4, abs=1e-9)
    assert len(result.graph()) == 11


def test_the_printed_lesson(capsys):
    six_weights.lesson()
    out = capsys.readouterr().out
    for text in (
        "draws e with the die, and l with the weights",
        "0.8868",
        "2.3551",
        "0.8847",
        "after 75 steps: 0.7383",
    ):
        assert text in out
    assert "   n  0.17  0.8856  -0.1172  -0.1176  0.182\n" in out


def test_the_picture_is_the_programs():
    """It has a box for each Value, with its number and its slope, and a line from each of its sources."""
    result, _ = six_weights.loss_graph(WEIGHTS)
    result.backward()
    picture = xml.etree.ElementTree.parse(DOCS / "six_weights.svg").getroot()
    tag = "{http://www.w3.org/2000/svg}"
    boxes = {(int(box.get("x")), int(box.get("y"))) for box in picture.iter(tag + "rect")}
    assert len(boxes) == 11 and max(x for x, _ in boxes) + 130 <= 700 and max(y for _, y in boxes) + 44 <= 406
    assert len(list(picture.iter(tag + "path"))) == sum(len(value.sources) for value in result.graph()) == 16
    texts = [text.text for text in picture.iter(tag + "text")]
    words = [(f"{value.name} = {value.data:.4f}", f"slope {value.slope:+.4f}") for value in result.graph()]
    assert texts == [text for pair in words for text in pair]
    assert "loss = 0.8868" in texts and "slope -0.1176" in texts


def test_why_log():
    """docs/why_log.md: of all weights, 1 - p is lowest if only n is written, and -log p if as often as in the text."""
    certain, counts = [0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 2, 1]
    assert six_weights.mean_loss(certain) == 0.5 and six_weights.mean_loss(counts) == 0.625

    def mean_log(weights):
        return six_weights.mean_loss(weights, lambda p: -math.log(p) if p else math.inf)

    assert mean_log(certain) == math.inf and mean_log(counts) == pytest.approx(1.0397, abs=5e-5)
    for i, j in ((0, 4), (4, 0), (0, 5), (5, 4)):  # moving weight from one to another token makes both losses worse
        moved = [w - 0.01 * (k == i) + 0.01 * (k == j) for k, w in enumerate(counts)]
        assert mean_log(moved) > mean_log(counts)
    assert TOKENS == "ailen."

"""The fields of the page's requests. Their types and ranges are checked here, once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from quill.cli import coerce, did_you_mean, option_types
from quill.errors import UserError
from quill.options import Checked, option


@dataclass(frozen=True)
class Fields(Checked, heading="A request"):
    """Every field that a request may have. Each address reads its own."""

    name: str = option("bundled", "a run, as /api/runs has it")
    step: int | None = option(None, "a saved step; null for the newest weights", at_least=0)
    matrix: str = option("", "the name of a parameter")
    text: str | None = option(None, "to score, to trace, or to train on")
    layer: int = option(0, "the layer whose attention is shown", at_least=0)
    head: int = option(0, "the head whose attention is shown", at_least=0)
    prompt: str = option("", "as for sample.py --start")
    count: int = option(10, "number of samples", at_least=1, at_most=20)
    max_new_tokens: int = option(200, "longest sample, in tokens", at_least=1, at_most=500)
    temperature: float = option(1.0, "divides the logits; 0 always takes the likeliest token", at_least=0)
    top_k: int | None = option(None, "draw from the k likeliest tokens", at_least=1)
    top_p: float | None = option(None, "draw from the likeliest tokens with this sum", above=0, at_most=1)
    seed: int = option(1337, "the same seed gives the same samples", at_least=0)
    action: Literal["train", "pause", "step"] = option("train", "step: take one step, then wait")
    config: str | None = option(None, "a config to start a run from, such as config/names.py")
    run: str | None = option(None, "a run to start from, in place of a config")
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "changes to the options", "limits": {}})
    documents: Literal["none", "lines"] = option("none", "whether each line of the text is a document")
    paused: bool = option(False, "the run waits before its first step")


def parse(body: bytes) -> Any:
    """Parse JSON. Raise a UserError if it is damaged, or holds NaN or Infinity, which JSON does not have."""
    try:
        return json.loads(body.decode(), parse_constant=lambda name: json.loads(""))
    except (ValueError, RecursionError):
        raise UserError("the request is not JSON") from None


def read(values: Any) -> Fields:
    """Return the fields of a request; null is the default. Raise a UserError for a wrong name, type or value."""
    if not isinstance(values, dict):
        raise UserError("the request must be a JSON object")
    kinds, checked = option_types(Fields), {}
    for key, value in values.items():
        if key not in kinds:
            raise UserError(f"there is no field {key!r:.80}{did_you_mean(key, kinds)}")
        kind = {str: str, str | None: str, dict[str, Any]: dict}.get(kinds[key])  # those that nothing is converted to
        if value is None or (kind and isinstance(value, kind)):
            checked[key] = value
        elif kind:
            raise UserError(f"{key} takes {'a text' if kind is str else 'an object'}")
        else:
            checked[key] = coerce(value, kinds[key], "", key)
    return Fields(**{key: value for key, value in checked.items() if value is not None})

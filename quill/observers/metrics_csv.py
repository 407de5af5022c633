"""metrics.csv: one row for each evaluation."""

import os
from pathlib import Path

from quill.errors import UserError
from quill.files import open_without_links, replacing
from quill.observers.observer import Evaluation, Observer
from quill.run_folder import what_is_kept
from quill.scoring import perplexity

COLUMNS: list[str] = ["step", "lr", "train_loss", "val_loss", "perplexity", "tokens_per_s", "seconds", "bits_per_byte"]


class MetricsFile(Observer):
    """The file metrics.csv in out_dir. A file of an older quill has the first columns only, and keeps them.

    Rows of later steps than `step`, the checkpoint's, are dropped, because these steps will run again. So are rows that
    a crash has truncated.
    """

    def __init__(self, out_dir: str, step: int):
        self.path, self.columns, rows = Path(out_dir) / "metrics.csv", COLUMNS, []
        if self.path.exists():
            header, *lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
            if header.split(",") == COLUMNS[: header.count(",") + 1]:
                self.columns = header.split(",")
            for row in lines:
                number, *others = row.split(",")
                if number.isdecimal() and int(number) <= step and len(others) == len(self.columns) - 1:
                    rows.append(row)
        with replacing(self.path) as (file,):
            file.write(("\n".join([",".join(self.columns), *rows]) + "\n").encode())

    def evaluated(self, evaluation: Evaluation) -> None:
        """Append a row."""
        values = vars(evaluation) | {"perplexity": perplexity(evaluation.val_loss)}
        values |= {"tokens_per_s": round(evaluation.tokens_per_s, 1), "seconds": round(evaluation.seconds, 3)}
        try:
            descriptor = open_without_links(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            with open(descriptor, "a", encoding="utf-8", newline="") as file:
                file.write(",".join(str(values[name]) for name in self.columns) + "\n")
        except OSError as error:
            raise UserError(f"can't write {self.path}: {error.strerror}; {what_is_kept(self.path.parent)}") from None

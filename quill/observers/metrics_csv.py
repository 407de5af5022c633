"""metrics.csv: one row for each evaluation."""

import csv
import os
from pathlib import Path
from typing import Any

from quill.errors import UserError
from quill.files import open_without_links, replacing
from quill.observers.observer import Evaluation, Observer
from quill.run_folder import what_is_kept
from quill.scoring import perplexity

COLUMNS: list[str] = ["step", "lr", "train_loss", "val_loss", "perplexity", "tokens_per_s", "seconds"]


class MetricsFile(Observer):
    """The file metrics.csv in out_dir. When it is opened, rows after `step` are dropped."""

    def __init__(self, out_dir: str, step: int):
        self.path = Path(out_dir) / "metrics.csv"
        self._drop_rows_after(step)

    def _drop_rows_after(self, step):
        """Drop rows after the checkpoint, because their steps will run again, and rows with a wrong number of columns.

        A crash may have truncated a row. Rows from before a column was added to COLUMNS are dropped too.
        """
        header, rows = ",".join(COLUMNS), []
        if self.path.exists():
            for row in self.path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
                number, *others = row.split(",")
                if number.isdecimal() and int(number) <= step and len(others) == len(COLUMNS) - 1:
                    rows.append(row)
        with replacing(self.path) as (file,):
            file.write(("\n".join([header, *rows]) + "\n").encode())

    def evaluated(self, evaluation: Evaluation) -> None:
        """Append a row."""
        values: dict[str, Any] = vars(evaluation) | {"perplexity": perplexity(evaluation.val_loss)}
        values |= {"tokens_per_s": round(evaluation.tokens_per_s, 1), "seconds": round(evaluation.seconds, 3)}
        row = {name: values[name] for name in COLUMNS}
        try:
            descriptor = open_without_links(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            with open(descriptor, "a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
        except OSError as error:
            kept = what_is_kept(self.path.parent)
            raise UserError(f"can't write {self.path}: {error.strerror}; {kept}") from None

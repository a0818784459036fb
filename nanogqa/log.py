"""The rows of metrics.jsonl."""
import json
from pathlib import Path


def read_rows(path):
    """The rows of a metrics.jsonl, as dicts with a whole number "step"; [] where there is no file.

    A line that is anything else, such as the last line of a killed run, is skipped.
    """
    if not Path(path).exists():
        return []
    rows = []
    for line in Path(path).read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows

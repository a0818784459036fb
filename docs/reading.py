"""What the scripts of docs/ share: reading results/ and writing differences."""
import functools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@functools.cache
def read(name):
    """The content of a JSON file of results/."""
    return json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))


def with_both_intervals(difference):
    """A Difference of nanogqa/estimates.py as text; empty for the first variant."""
    if difference is None:
        return ""
    return f"{difference.text(3)} (± {difference.half_together:.3f})"

"""Draws docs/designs.png: what nine designs of the cache cost and what they can do, against bytes.

    python docs/designs.py         needs matplotlib

Losses on text and times are of results/cache, right answers on associative recall of
results/cache_recall. docs/cache.md describes both.
"""
import json
import sys
from pathlib import Path

import matplotlib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from nanogqa import pictures
from nanogqa.summary import by_shape, summarize


def read(name):
    """The content of results.json of a comparison in results/."""
    return json.loads((ROOT / "results" / name / "results.json").read_text(encoding="utf-8"))


def draw(path):
    text = read("cache")
    summaries = summarize(text)
    losses = pictures.loss_points(summaries)
    answers = pictures.metric_points(summarize(read("cache_recall")), "val_acc")
    panels = [
        pictures.Panel("loss on text, nats per byte", losses, lower=True),
        pictures.Panel("right answers on associative recall", answers, lower=False),
        pictures.time_panel(by_shape(summaries), text),
    ]
    with matplotlib.rc_context(pictures.STYLE):
        colors = pictures.colors_of(matplotlib, summaries)
        figure = pictures.draw_panels(panels, colors, summaries[0].name)
        figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(ROOT / "docs/designs.png")

"""Draws the pictures that join comparisons of results/: docs/designs.png and docs/fields.png.

    python docs/pictures.py         needs matplotlib

docs/cache.md and docs/recall.md describe the comparisons.
"""
import matplotlib
from reading import ROOT, read

from nanogqa import pictures
from nanogqa.configurator import plural
from nanogqa.pictures import Panel, loss_points, metric_points, time_panel
from nanogqa.summary import by_key, summarize


def designs():
    """What nine designs of the cache cost and what they can do, against bytes: losses on text and
    times of results/cache, right answers on associative recall of results/cache_recall."""
    text = read("cache/results.json")
    summaries = summarize(text)
    answers = metric_points(summarize(read("cache_recall/results.json")), "val_acc")
    return [
        Panel("loss on text, nats per byte", loss_points(summaries), lower=True),
        Panel("right answers on associative recall", answers, lower=False),
        time_panel(by_key(summaries), text),
    ], summaries


def fields():
    """Right answers about records of one, two and four fields, against bytes."""
    panels = []
    for number, folder in ((1, "recall_fields/1"), (2, "recall_fields/2"), (4, "recall_heads")):
        summaries = summarize(read(f"{folder}/results.json"))
        points = metric_points(summaries, "val_acc")
        panels.append(Panel(f"right answers, {plural(number, 'field')}", points, lower=None))
    return panels, summaries


def draw(panels, summaries, path, ylim=None):
    """Draws panels side by side. summaries give colors and names, the first one is the baseline;
    ylim are the ends of all vertical axes, if given."""
    with matplotlib.rc_context(pictures.STYLE):
        colors = pictures.colors_of(matplotlib, summaries)
        figure = pictures.draw_panels(panels, colors, summaries[0].name)
        if ylim is not None:
            for axis in figure.axes:
                axis.set_ylim(*ylim)
        figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(*designs(), ROOT / "docs/designs.png")
    draw(*fields(), ROOT / "docs/fields.png", ylim=(0, 1.1))

"""The figures of the learning rates on associative recall, for docs/figures.py."""
import statistics

from reading import read
from recall_figures import listed, recall_runs, steps_to_nine_tenths

from nanogqa.estimates import holm, rank_test
from nanogqa.report import table
from nanogqa.summary import summarize

RATES = ("0.005", "0.01", "0.02")
# folder of results/recall_rates with two seeds for each rate: fields and records
POINTS = {"1": (1, 8), "2": (2, 8), "2n16": (2, 16), "2n32": (2, 32), "4": (4, 8), "width": (2, 8)}
NAMES = {"n_head=8": "8 heads of 8", "n_head=4": "4 heads of 16"}


def by_rate(folder):
    """{variant: {rate: its Summary}} of a comparison of learning rates."""
    found = {}
    for summary in summarize(read(f"recall_rates/{folder}/results.json")):
        name, _, rate = summary.name.partition(" learning_rate=")
        found.setdefault(name, {})[rate] = summary
    return found


def best_rate(summaries):
    """The rate with the lowest mean loss, of {rate: Summary}."""
    return min(summaries, key=lambda rate: summaries[rate].loss.mean)


def recall_rates():
    """Last losses and right answers of two seeds at each rate; the best rate of a row is bold."""
    rows = []
    for folder, (fields, records) in POINTS.items():
        for name, summaries in by_rate(folder).items():
            row = [str(fields), str(records), NAMES.get(name, name)]
            for rate in RATES:
                row.append(rate_cell(folder, summaries[rate], rate == best_rate(summaries)))
            rows.append(row)
    return table(["fields", "records", "", *RATES], rows)


def rate_cell(folder, summary, best):
    losses = []
    for record in read(f"recall_rates/{folder}/results.json")["records"]:
        if record["variant"] == summary.name:
            losses.append(record["val_loss"])
    text = f"{statistics.mean(losses):.3f}"
    if best:
        text = f"**{text}**"
    return f"{text} ({listed(summary.metrics['val_acc'])})"

"""The figures of the learning rates on associative recall, for docs/figures.py."""
import statistics

from reading import read
from recall_figures import last_losses, listed, recall_runs, steps_to_nine_tenths

from nanogqa.estimates import estimate_differences, holm
from nanogqa.report import table
from nanogqa.summary import summarize

RATES = ("0.005", "0.01", "0.02", "0.04")
# fields, records and the folder of results/ with two seeds for each rate
POINTS = (("1", "8", "recall_rates/1"), ("2", "8", "recall_rates/2"),
          ("2", "16", "recall_rates/2n16"), ("2", "32", "recall_rates/2n32"),
          ("4", "8", "recall_rates/4"), ("2", "8", "recall_rates/width"))
NAMES = {"n_head=8": "8 heads of width 8", "n_head=4": "4 heads of width 16"}
# fields, records, name, rate, and where its six seeds are: a folder of results/ and a variant
SIX = (
    ("2", "8", "MHA", "0.01", "recall_fields/2", "MHA"),
    ("2", "8", "MQA", "0.01", "recall_fields/2", "MQA"),
    ("2", "8", "MQA", "0.02", "recall_rates/2_mqa", "learning_rate=0.02"),
    ("2", "16", "MHA", "0.01", "recall_records/16", "MHA"),
    ("2", "16", "MQA", "0.01", "recall_records/16", "MQA"),
    ("2", "16", "MHA", "0.02", "recall_rates/2n16_fast", "MHA"),
    ("2", "16", "MQA", "0.02", "recall_rates/2n16_fast", "MQA"),
    ("2", "32", "MHA", "0.01", "recall_records/32", "MHA"),
    ("2", "32", "MQA", "0.01", "recall_records/32", "MQA"),
    ("2", "32", "MQA", "0.02", "recall_rates/2n32_mqa", "learning_rate=0.02"),
    ("4", "8", "MHA", "0.01", "recall_fields/4", "MHA"),
    ("4", "8", "MQA", "0.01", "recall_rates/4_mqa", "learning_rate=0.01"),
    ("4", "8", "MQA", "0.02", "recall_rates/4_mqa", "learning_rate=0.02"),
)


def by_rate(folder):
    """{variant: {rate: its Summary}} of a comparison of learning rates."""
    found = {}
    for summary in summarize(read(f"{folder}/results.json")):
        name, _, rate = summary.name.partition("learning_rate=")
        found.setdefault(name.strip(), {})[rate] = summary
    return found


def best_rate(summaries):
    """The rate with the lowest mean loss, of {rate: Summary}."""
    return min(summaries, key=lambda rate: summaries[rate].loss.mean)


def recall_rates():
    """Mean loss and right answers of two seeds at each rate; the lowest loss of a row is bold."""
    rows = []
    for fields, records, folder in POINTS:
        for name, summaries in by_rate(folder).items():
            row = [fields, records, NAMES.get(name, name)]
            for rate in RATES:
                row.append(rate_cell(summaries.get(rate), rate == best_rate(summaries)))
            rows.append(row)
    return table(["fields", "records", "", *RATES], rows)


def rate_cell(summary, best):
    """A mean loss and, in parentheses, the right answers of each seed; empty without a run."""
    if summary is None:
        return ""
    text = f"{summary.loss.mean:.4f}"
    if best:
        text = f"**{text}**"
    return f"{text} ({listed(summary.metrics['val_acc'])})"


def recall_rates_six():
    """Six seeds at the rates that two seeds found the best, and at 0.01."""
    rows = []
    for fields, records, name, rate, folder, variant in SIX:
        runs = recall_runs(folder, variant)
        shares = [points[-1][1] for points in runs]
        rows.append([
            fields, records, name, rate, listed(shares), f"{statistics.mean(shares):.2f}",
            ", ".join(steps_to_nine_tenths(points) for points in runs),
            f"{statistics.mean(last_losses(folder, variant)):.3f}",
        ])
    return table(["fields", "records", "", "learning rate", "right answers of each seed", "mean",
                  "steps to 0.9", "mean loss"], rows)


def six_losses(records, name, rate):
    """The last losses of six seeds with two fields."""
    for *point, folder, variant in SIX:
        if point == ["2", records, name, rate]:
            return last_losses(folder, variant)
    raise ValueError(f"{name} was not trained at {rate} with {records} records")


def of_recall_rates():
    """For each number of records: the difference in loss of MQA at its best rate to MHA at its
    own, and its p value with Holm's correction for all of them (docs/recall.md)."""
    texts, p_values = {}, {}
    for fields, records, folder in POINTS:
        if fields != "2" or folder == "recall_rates/width":
            continue
        best = {name: best_rate(summaries) for name, summaries in by_rate(folder).items()}
        samples = tuple(six_losses(records, name, best[name]) for name in ("MQA", "MHA"))
        difference = estimate_differences({"MQA": samples}, by_ranks=True)["MQA"]
        p_values[records] = difference.p
        texts[f"rates{records}_minus"] = difference.text(3)
    for records, p in holm(p_values).items():
        texts[f"rates{records}_p"] = f"{p:.3f}"
    return texts


TABLES = {"recall_rates": recall_rates, "recall_rates_six": recall_rates_six}

"""The figures of the comparisons on associative recall, for docs/figures.py."""
import statistics
from functools import partial

from reading import ROOT, read, with_both_intervals

from nanogqa.estimates import estimate_differences, holm, paired
from nanogqa.log import read_rows
from nanogqa.report import table
from nanogqa.summary import cache_bytes, summarize


def right_answers(folder, run):
    """[(step, share of right answers)] of the evaluations of a run on associative recall."""
    points = []
    for row in read_rows(ROOT / "results" / folder / "runs" / run / "metrics.jsonl"):
        if row.get("val_acc") is not None:
            points.append((row["step"], row["val_acc"]))
    return points


def steps_to_nine_tenths(points):
    """The first step at which 0.9 of the answers were right, as text; "never" without one."""
    for step, share in points:
        if share >= 0.9:
            return f"{step:,}"
    return "never"


def listed(numbers):
    """Numbers with two decimals, separated by commas."""
    return ", ".join(f"{number:.2f}" for number in numbers)


def recall_runs(folder, variant):
    """right_answers of each run of a variant."""
    runs = []
    for record in read(f"{folder}/results.json")["records"]:
        if record["variant"] == variant:
            runs.append(right_answers(folder, record["run"]))
    return runs


def last_losses(folder, variant):
    """The last loss of each seed of a variant."""
    losses = []
    for record in read(f"{folder}/results.json")["records"]:
        if record["variant"] == variant:
            losses.append(record["val_loss"])
    return losses


HEADER = ["", "cache, bytes per token", "right answers of each seed", "mean", "steps to 0.9"]


def recall_table(folder, first="MHA"):
    """Every variant of a comparison; first is the one that the others are compared to."""
    return table([*HEADER, f"loss minus that of {first}, nats per answer"], recall_rows(folder))


def recall_rows(folder, names=None):
    """The rows of a comparison, for the variants in names; None: all."""
    rows = []
    for summary in summarize(read(f"{folder}/results.json")):
        if names is not None and summary.name not in names:
            continue
        runs = recall_runs(folder, summary.name)
        shares = [points[-1][1] for points in runs]
        rows.append([
            summary.name,
            f"{summary.facts['kv_bytes_per_token']:,}",
            listed(shares),
            f"{statistics.mean(shares):.2f}",
            ", ".join(steps_to_nine_tenths(points) for points in runs),
            with_both_intervals(summary.difference),
        ])
    return rows


FIELDS = {"1": "recall_fields/1", "2": "recall_fields/2", "4": "recall_fields/4",
          "4, twice the steps": "recall_fields/longer"}
RECORDS_OF = {"8": "recall_fields/2", "16": "recall_records/16", "32": "recall_records/32"}
ROTATED = {"all": "recall_heads", "half": "recall_partial"}


def joined_table(title, folders):
    """MHA and MQA of several comparisons; the first column, title, says which."""
    rows = []
    for label, folder in folders.items():
        for row in recall_rows(folder, ("MHA", "MQA")):
            rows.append([label, *row])
    return table([title, *HEADER, "loss minus that of MHA, nats per answer"], rows)


LENGTH, RECORDS = 128, 8  # of a sequence of data/recall


def mean_answers(fields):
    """Answers of a training sequence, which has 8, 4 or 2 records."""
    width, relations = max(2, fields), max(1, fields * (fields - 1))
    answers = []
    for records in (RECORDS, RECORDS // 2, RECORDS // 4):
        room = (LENGTH - 1 - records * (width + 1)) // 4
        answers.append(min(room, records * relations))
    return statistics.mean(answers)


def guess_among_the_rest():
    """The share of right answers of guesses among the records that were not asked for yet, where
    each is asked for once (docs/recall.md)."""
    return statistics.mean(1 / left for left in range(1, RECORDS + 1))


def designs_recall():
    """Right answers of every design of config/cache.py on associative recall (docs/cache.md)."""
    rows = []
    for summary in summarize(read("cache_recall/results.json")):
        shares = summary.metrics["val_acc"]
        rows.append([
            f"[{summary.name}](../config/{summary.name}.py)",
            f"{cache_bytes(summary) / 1e3:,.0f}",
            listed(shares),
            f"{statistics.mean(shares):.2f}",
            with_both_intervals(summary.difference),
        ])
    return table(["design", "cache of 4,096 tokens, kB", "right answers of each seed", "mean",
                  "loss minus that of mha, nats per answer"], rows)


def of_designs_recall():
    """With how many seeds each design answers 0.9 or more, its difference to mha, and the length of
    the runs (docs/cache.md)."""
    results = read("cache_recall/results.json")
    tokens = results["settings"]["max_steps"] * results["settings"]["tokens_per_step"]
    texts = {"designs_recall_tokens": f"{tokens / 1e6:.1f} million",
             "designs_recall_answers": f"{tokens / LENGTH * mean_answers(1) / 1e6:.2f} million",
             "designs_recall_seeds": str(results["settings"]["seeds"])}
    for summary in summarize(results):
        shares = summary.metrics["val_acc"]
        texts[f"{summary.name}_learned"] = str(sum(share >= 0.9 for share in shares))
        if summary.difference:
            texts[f"{summary.name}_recall_minus"] = summary.difference.text(3)
    return texts


def of_recall(key, folder, fields):
    """Seeds, tokens and answers of training, and what of_experiment gives. Names begin with key."""
    settings = read(f"{folder}/results.json")["settings"]
    tokens = settings["max_steps"] * settings["tokens_per_step"]
    answers = tokens / LENGTH * mean_answers(fields)
    return of_experiment(key, folder) | {
        f"{key}_seeds": str(settings["seeds"]),
        f"{key}_tokens": f"{tokens / 1e6:.1f} million",
        f"{key}_answers": f"{answers / 1e6:.2f} million",
    }


def of_experiment(key, folder):
    """For each variant of a comparison: the mean of right answers, by how many % it is smaller than
    the first one and how many times as large, the difference in loss and its p value (Holm)."""
    texts = {}
    summaries = summarize(read(f"{folder}/results.json"))
    for summary in summaries:
        name = f"{key}_{summary.name.lower().replace('-', '').replace('=', '')}"
        size = summary.facts["params"] / summaries[0].facts["params"]
        texts[name] = f"{statistics.mean(summary.metrics['val_acc']):.2f}"
        texts[f"{name}_smaller"] = f"{100 * (1 - size):.0f}"
        texts[f"{name}_as_large"] = f"{size:.1f}"
        if summary.difference:
            texts[f"{name}_minus"] = summary.difference.text(3)
            texts[f"{name}_p"] = f"{summary.difference.p_holm:.3f}"
    return texts


def of_recall_fields():
    """For each number of fields in results/recall_fields: the means of right answers, the
    difference in loss, and its p value with Holm's correction for all of them (docs/recall.md)."""
    texts, p_values, sizes = {}, {}, []
    for folder in FIELDS.values():
        mha, mqa = summarize(read(f"{folder}/results.json"))
        folder = folder.removeprefix("recall_fields/")
        texts[f"fields_{folder}_mha"] = f"{statistics.mean(mha.metrics['val_acc']):.2f}"
        texts[f"fields_{folder}_mqa"] = f"{statistics.mean(mqa.metrics['val_acc']):.2f}"
        texts[f"fields_{folder}_minus"] = mqa.difference.text(3)
        sizes.append(100 * (1 - mqa.facts["params"] / mha.facts["params"]))
        if folder != "longer":  # which repeats four fields
            p_values[folder] = mqa.difference.p
    for folder, p in holm(p_values).items():
        texts[f"fields_{folder}_p"] = f"{p:.3f}"
    texts["fields_2_p_alone"] = f"{p_values['2']:.3f}"
    seeds = {record["seed"] for record in read("recall_fields/longer/results.json")["records"]}
    results = read("recall_fields/4/results.json")
    records = [record for record in results["records"] if record["seed"] in seeds]
    mha, mqa = summarize(dict(results, records=records))
    texts["fields_before_mha"] = f"{statistics.mean(mha.metrics['val_acc']):.2f}"
    texts["fields_before_mqa"] = f"{statistics.mean(mqa.metrics['val_acc']):.2f}"
    texts["fields_before_minus"] = f"{mqa.difference.mean:+.3f}"
    return texts | {"fields_smaller_low": f"{min(sizes):.0f}",
                    "fields_smaller_high": f"{max(sizes):.0f}"}


def of_recall_records():
    """The p value of MQA for each number of records, with Holm's correction for all of them."""
    p_values = {}
    for records, folder in RECORDS_OF.items():
        p_values[records] = summarize(read(f"{folder}/results.json"))[1].difference.p
    texts = {f"records{records}_p": f"{p:.3f}" for records, p in holm(p_values).items()}
    return texts | {"records16_p_alone": f"{p_values['16']:.3f}"}


def change_by_rotation():
    """The Difference between MQA's distance to MHA with half of each head rotated and with all of
    it, over the same seeds."""
    distances = []
    for folder in ("recall_partial", "recall_heads"):
        settings = read(f"{folder}/results.json")["settings"]
        assert (settings["seed"], settings["seeds"]) == (11, 6), "the pairs need equal seeds"
        distances.append(paired(last_losses(folder, "MQA"), last_losses(folder, "MHA")))
    return estimate_differences({"change": tuple(distances)})["change"]


def of_wide_mqa():
    """How many times the FLOPs and the time of a training step wide MQA takes beside MHA
    (docs/recall.md)."""
    results = read("recall_wide/results.json")
    facts = {summary.name: summary.facts for summary in summarize(results)}
    step = {name: results["speed"][facts[name]["shape"]]["train"][0]["step_ms"] for name in facts}
    flops = facts["wide_mqa"]["flops_per_token"] / facts["mha"]["flops_per_token"]
    return {"wide_mqa_flops": f"{flops:.1f}",
            "wide_mqa_step": f"{step['wide_mqa'] / step['mha']:.1f}"}


TABLES = {
    "recall": partial(recall_table, "recall"),
    "recall_one_field": partial(recall_table, "recall_one_field"),
    "recall_wide": partial(recall_table, "recall_wide", "mha"),
    "recall_fields": partial(joined_table, "fields", FIELDS),
    "recall_heads": partial(recall_table, "recall_heads"),
    "recall_records": partial(joined_table, "records", RECORDS_OF),
    "recall_partial": partial(joined_table, "rotated", ROTATED),
    "recall_width": partial(recall_table, "recall_width", "8 heads"),
    "designs_recall": designs_recall,
}


def values():
    """{name: text} of all figures that sentences quote."""
    return dict(
        **of_recall("recall", "recall", 3), **of_recall("one_recall", "recall_one_field", 1),
        **of_experiment("wide", "recall_wide"), **of_wide_mqa(), **of_designs_recall(),
        **of_recall_fields(), **of_experiment("heads", "recall_heads"),
        **of_recall_records(), **of_experiment("partial", "recall_partial"),
        **of_experiment("width", "recall_width"),
        rotation_changes=change_by_rotation().text(3),
        one_guess=f"{guess_among_the_rest():.2f}")

"""One summary for each variant of a comparison, from the records of its results.json."""
import statistics
from dataclasses import dataclass

from nanogqa.costs import CONTEXT
from nanogqa.estimates import (
    Difference,
    Estimate,
    estimate_differences,
    mean_over_seeds,
    steps_to,
)


@dataclass
class Summary:
    """One variant in one matching, over all seeds."""
    name: str
    match: str                    # shape or params
    key: str                      # of its timings in results["speed"]
    facts: dict                   # its first record, for what does not depend on the seed
    is_first: bool                # the variant that the others of its matching are compared to
    loss: Estimate                # nats per target, with the standard error
    bits_per_byte: float | None   # None where the loss counts answers alone
    metrics: dict                 # {name: value of each seed}, beyond loss and bits per byte
    difference: Difference | None  # to the first variant's loss; None for the first
    curves: list                  # of each seed: [step, validation loss] pairs
    mean_curve: list              # of all seeds: (step, validation loss) pairs
    steps_to_first: float | None  # steps until its mean curve reaches the first variant's loss


def summarize(results):
    """A Summary for each variant of each matching, in the order of the records."""
    groups = {}
    for record in results["records"]:
        groups.setdefault((record["match"], record["variant"]), []).append(record)
    first = {}  # {matching: records of its first variant}
    # {key: (losses, losses of the first variant)}: one model in both matchings is one comparison
    samples = {}
    for (match, _), records in groups.items():
        first.setdefault(match, records)
        if records is not first[match]:
            samples[records[0]["shape"]] = (column(records, "val_loss"),
                                            column(first[match], "val_loss"))
    differences = estimate_differences(samples, by_ranks=counts_answers(results["records"]))
    summaries = []
    for (match, _), records in groups.items():
        difference = None
        if records is not first[match]:
            difference = differences[records[0]["shape"]]
        summaries.append(summarize_variant(records, first[match], difference))
    return summaries


def counts_answers(records):
    """Whether the losses are those of answers alone: then there are no bits per byte of a text."""
    return records[0]["val_bpb"] is None


def summarize_variant(records, first, difference):
    """The Summary of one variant; first holds the records of the first variant, seed by seed."""
    first_losses = column(first, "val_loss")
    curves = column(records, "curve")
    curve = mean_curve(curves)
    bits = column(records, "val_bpb")
    bits_per_byte = None
    if None not in bits:
        bits_per_byte = statistics.mean(bits)
    return Summary(
        name=records[0]["variant"],
        match=records[0]["match"],
        key=records[0]["shape"],
        facts=records[0],
        is_first=records is first,
        loss=mean_over_seeds(column(records, "val_loss")),
        bits_per_byte=bits_per_byte,
        metrics=metrics_over_seeds(records),
        difference=difference,
        curves=curves,
        mean_curve=curve,
        steps_to_first=steps_to(curve, statistics.mean(first_losses)),
    )


def column(rows, key):
    """The values of one key in a list of dicts."""
    return [row[key] for row in rows]


def metrics_over_seeds(records):
    """{name: [value of each seed]}, beyond val_loss and val_bpb, of what every record has."""
    metrics = [record.get("metrics", {}) for record in records]  # older results have none
    values = {}
    for name in metrics[0]:
        shared = all(name in row for row in metrics)
        if shared and name not in ("val_loss", "val_bpb"):
            values[name] = column(metrics, name)
    return values


def mean_curve(curves):
    """(step, mean loss) points of curves that were evaluated at the same steps."""
    mean = []
    for points in zip(*curves, strict=True):
        steps, losses = zip(*points, strict=True)
        mean.append((steps[0], statistics.mean(losses)))
    return mean


def unit_of(summary):
    """What its losses are a mean over: tokens, or answers where they alone count."""
    if summary.bits_per_byte is None:
        return "answer"
    return "token"


def cache_bytes(summary):
    """Bytes that a variant caches for CONTEXT tokens; older results have no windows."""
    return summary.facts.get("kv_bytes_of_context", CONTEXT * summary.facts["kv_bytes_per_token"])


def compared(summaries):
    """The summaries that are compared to a first variant, each model once."""
    return by_key([summary for summary in summaries if not summary.is_first]).values()


def by_key(summaries):
    """{key: its first summary}: a variant that is one model in both matchings counts once."""
    models = {}
    for summary in summaries:
        models.setdefault(summary.key, summary)
    return models


def with_match(summaries, match):
    return [summary for summary in summaries if summary.match == match]


def metric_names(summaries):
    """The metrics that any variant has, each once, in order."""
    names = []
    for summary in summaries:
        for name in summary.metrics:
            if name not in names:
                names.append(name)
    return names


def shown_name(metric):
    """The name of a metric for readers: val_acc is the share of answers that are right."""
    if metric == "val_acc":
        return "right answers"
    return metric.removeprefix("val_").replace("_", " ")


def matches_of(summaries):
    """The matchings, each once, in order."""
    return list(dict.fromkeys(summary.match for summary in summaries))

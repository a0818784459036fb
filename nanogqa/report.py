"""Statistics, tables and pictures of a comparison, from the content of its results.json."""
import itertools
import math
import statistics
from dataclasses import dataclass
from typing import NamedTuple

# Differences between MHA, GQA and MQA in papers, in nats, near 124 million parameters.
PUBLISHED_SMALLEST = 0.008
PUBLISHED_LARGEST = 0.04


# -- statistics ------------------------------------------------------------------------------------

class Estimate(NamedTuple):
    """A mean over seeds and its error; None where one seed gives no error."""
    mean: float
    error: float | None           # standard error, or half the width of a 95 % interval

    def text(self, sign=""):
        text = f"{self.mean:{sign}.4f}"
        if self.error is not None:
            text += f" ± {self.error:.4f}"
        return text


def student_t(df, p=0.975):
    """The p quantile of Student's t with df degrees of freedom.

    Bisects the closed form of the distribution function.
    """
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        if two_sided_probability(middle, df) < 2 * p - 1:
            low = middle
        else:
            high = middle
    return low


def two_sided_probability(t, df):
    """P(|T| < t) of Student's t with df degrees of freedom.

    Abramowitz and Stegun 1964: 26.7.3 for odd df, 26.7.4 for even df.
    """
    theta = math.atan(t / math.sqrt(df))
    odd = df % 2 == 1
    term = 1.0
    if odd:
        term = math.cos(theta)
    total = 0.0
    for k in range(2 + odd, df + 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (k - 1) / k
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total


def mean_over_seeds(values):
    """The mean of values and its standard error."""
    if len(values) < 2:
        return Estimate(statistics.mean(values), None)
    return Estimate(statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)))


def paired(values, reference):
    """The mean of values - reference and half the width of its 95 % interval.

    Both lists are ordered by seed: the difference is taken within each seed.
    """
    differences = [value - other for value, other in zip(values, reference, strict=True)]
    mean, standard_error = mean_over_seeds(differences)
    if standard_error is None:
        return Estimate(mean, None)
    return Estimate(mean, student_t(len(differences) - 1) * standard_error)


def steps_to(curve, loss):
    """The step at which a curve of (step, loss) points first falls to loss; None if it never does.

    The curve is interpolated linearly between its points.
    """
    for (step, before), (next_step, after) in itertools.pairwise(curve):
        if before > loss >= after:
            return step + (next_step - step) * (before - loss) / (before - after)
    return None


def verdict(mean, half):
    """What a difference in loss, with half the width of its interval, says of a variant."""
    if half is None:
        return "one seed: no error bar"
    if abs(mean) <= half:
        return "not distinguishable"
    if mean < 0:
        return "better"
    return "worse"


# -- one summary for each variant ------------------------------------------------------------------

@dataclass
class Summary:
    """One variant in one matching, over all seeds."""
    name: str
    match: str                    # shape or params
    shape: str                    # key of its timings in results["speed"]
    facts: dict                   # its first record, for what does not depend on the seed
    is_first: bool                # the variant that the others of its matching are compared to
    loss: Estimate                # nats per token, with the standard error
    bits_per_byte: float
    metrics: dict                 # {name: Estimate} of the metrics beyond loss and bits per byte
    difference: Estimate          # of the losses to the first variant's, with half the interval
    curves: list                  # of each seed: [step, validation loss] pairs
    mean_curve: list              # of all seeds: (step, validation loss) pairs
    steps_to_first: float | None  # steps until its mean curve reaches the first variant's loss
    tokens_per_sec: float         # median over its runs


def summarize(results):
    """A Summary for each variant of each matching, in the order of the records."""
    groups = {}
    for record in results["records"]:
        groups.setdefault((record["match"], record["variant"]), []).append(record)
    first = {}  # {matching: records of its first variant}
    summaries = []
    for (match, _), records in groups.items():
        first.setdefault(match, records)
        summaries.append(summarize_variant(records, first[match]))
    return summaries


def summarize_variant(records, first):
    """The Summary of one variant; first holds the records of the first variant, seed by seed."""
    losses = column(records, "val_loss")
    first_losses = column(first, "val_loss")
    curves = column(records, "curve")
    curve = mean_curve(curves)
    return Summary(
        name=records[0]["variant"],
        match=records[0]["match"],
        shape=records[0]["shape"],
        facts=records[0],
        is_first=records is first,
        loss=mean_over_seeds(losses),
        bits_per_byte=statistics.mean(column(records, "val_bpb")),
        metrics=summarize_metrics(records),
        difference=paired(losses, first_losses),
        curves=curves,
        mean_curve=curve,
        steps_to_first=steps_to(curve, statistics.mean(first_losses)),
        tokens_per_sec=statistics.median(column(records, "tokens_per_sec")),
    )


def column(rows, key):
    """The values of one key in a list of dicts."""
    return [row[key] for row in rows]


def summarize_metrics(records):
    """{name: Estimate} of the metrics beyond val_loss and val_bpb that every record has."""
    metrics = [record.get("metrics", {}) for record in records]  # older results have none
    summary = {}
    for name in metrics[0]:
        shared = all(name in row for row in metrics)
        if shared and name not in ("val_loss", "val_bpb"):
            summary[name] = mean_over_seeds(column(metrics, name))
    return summary


def mean_curve(curves):
    """(step, mean loss) points of curves that were evaluated at the same steps."""
    mean = []
    for points in zip(*curves, strict=False):
        steps, losses = zip(*points, strict=True)
        mean.append((steps[0], statistics.mean(losses)))
    return mean


def resolution(summaries):
    """Half the width of a paired 95 % interval in nats, pooled over the variants.

    None where there are no intervals: with one seed or one variant.
    """
    squares = []
    for summary in summaries:
        if not summary.is_first and summary.difference.error is not None:
            squares.append(summary.difference.error ** 2)
    if not squares:
        return None
    return math.sqrt(statistics.mean(squares))


def by_shape(summaries):
    """{shape: its first summary}: variants that are one model in both matchings are timed once."""
    shapes = {}
    for summary in summaries:
        shapes.setdefault(summary.shape, summary)
    return shapes


def with_match(summaries, match):
    return [summary for summary in summaries if summary.match == match]


# -- report.md -------------------------------------------------------------------------------------

ABOUT_QUALITY = (
    "Losses are in nats per token, mean over seeds ± standard error. Differences are between runs "
    "with the same seed, which share the order of the data and the initial value of every weight "
    "of equal name and shape. The intervals are Student's; each one has a confidence of 95 % by "
    "itself, not all of them together. Steps are read off the mean curve by linear interpolation; "
    "their time counts training steps alone."
)
ABOUT_SPEED = (
    "bench.py measures speeds and memory with random weights of the same shape. It times every "
    "shape in two rounds; the table shows the better one. Memory excludes the imports."
)


def report(results, pictures):
    """The text of report.md; pictures are paths of files beside it."""
    summaries = summarize(results)
    first = summaries[0].name
    titles = {"shape": f"Equal shape: only what the name says differs from {first}",
              "params": f"Equal parameters: n_ff is adjusted to the parameters of {first}"}
    blocks = introduction(results, summaries)
    for match, title in titles.items():
        matched = with_match(summaries, match)
        if matched:
            blocks += [f"## {title}", quality_table(matched, results["speed"])]
    blocks += [ABOUT_QUALITY, "## What this run can resolve", resolution_text(summaries)]
    blocks += ["## Speed", *speed_tables(results["speed"], summaries), ABOUT_SPEED]
    for path in pictures:
        blocks.append(f"![{path.stem}]({path.name})")
    return "\n\n".join(blocks) + "\n"


def introduction(results, summaries):
    """Blocks of text: the title, what was run where, and the heads of every variant."""
    settings = results["settings"]
    machine = results["machine"]
    device = machine["gpu"] or machine["cpu"]
    heads = {}
    for summary in summaries:
        if "heads" in summary.facts:  # older results lack it
            heads[summary.name] = f"- {summary.name}: {summary.facts['heads']}"
    variants = {summary.name for summary in summaries}
    blocks = [
        f"# Comparison of {len(variants)} variants, {settings['seeds']} seeds",
        f"{settings['max_steps']} steps of {settings['tokens_per_step']:,} tokens on data set "
        f"{settings['dataset']} (sha256 {results['dataset_sha256'][:16]}), tokenizer "
        f"{results['tokenizer']}. {device}, {machine['threads']} threads, "
        f"torch {machine['torch']}, {machine['dtype']}, {machine['ranks']} rank(s), "
        f"{results['date']}.",
    ]
    if heads:
        blocks.append("\n".join(heads.values()))
    return blocks


def quality_table(summaries, speed):
    """Costs, losses and differences of the variants of one matching."""
    first = summaries[0]
    metrics = metric_names(summaries)
    head = ["variant", "n_ff", "parameters", "without embedding", "training FLOPs per token",
            "cache, bytes per token", "validation loss", "bits per byte"]
    for name in metrics:
        head.append(name.removeprefix("val_").replace("_", " "))
    head += [f"difference to {first.name}, 95 % interval", "", f"steps to the loss of {first.name}"]
    rows = []
    for summary in summaries:
        row = cost_cells(summary, first.facts["params"])
        row += [summary.loss.text(), f"{summary.bits_per_byte:.4f}"]
        for name in metrics:
            row.append(metric_cell(summary, name))
        row += [*difference_cells(summary), steps_cell(summary, speed)]
        rows.append(row)
    return table(head, rows)


def metric_names(summaries):
    """The metrics that any variant has, each once, in order."""
    names = []
    for summary in summaries:
        for name in summary.metrics:
            if name not in names:
                names.append(name)
    return names


def cost_cells(summary, first_params):
    facts = summary.facts
    return [
        summary.name,
        str(facts["n_ff"]),
        f"{facts['params']:,} ({facts['params'] / first_params - 1:+.2%})",
        f"{facts['non_embedding_params']:,}",
        f"{facts['flops_per_token']:,}",
        f"{facts['kv_bytes_per_token']:,}",
    ]


def metric_cell(summary, name):
    if name not in summary.metrics:
        return ""
    return summary.metrics[name].text()


def difference_cells(summary):
    """The difference to the first variant and its verdict; empty for the first itself."""
    if summary.is_first:
        return ["", ""]
    return [summary.difference.text("+"), verdict(*summary.difference)]


def steps_cell(summary, speed):
    """Steps and seconds until the first variant's final loss."""
    steps = summary.steps_to_first
    if steps is None:
        return "never"
    step_ms = speed[summary.shape]["train"][0]["step_ms"]
    return f"{steps:,.0f} ({steps * step_ms / 1e3:,.0f} s)"


def resolution_text(summaries):
    """Which differences this comparison can detect, next to those that papers report."""
    half = resolution(summaries)
    if half is None:
        return ("One seed, or one variant, gives no error bar: any difference above may be due to "
                "chance.")
    if half < PUBLISHED_SMALLEST:
        conclusion = "This run can detect all of them."
    elif half < PUBLISHED_LARGEST:
        conclusion = "This run can detect the larger of them, but not the smaller."
    else:
        conclusion = "This run cannot rank such variants; it bounds their differences."
    return (f"The intervals have a half-width of {half:.4f} nats, pooled over the variants: the "
            "smallest difference that this run can detect. Published differences between MHA, GQA "
            f"and MQA are {PUBLISHED_SMALLEST} to {PUBLISHED_LARGEST} nats, near 124 million "
            f"parameters. {conclusion}")


def speed_tables(speed, summaries):
    """Blocks of text: the tables of training and decoding, with their captions."""
    shapes = by_shape(summaries)
    return [
        training_table(speed, shapes),
        "Decoding, ms per step, batch x context:",
        decoding_table(speed, shapes, decode_ms),
        "Prefill, ms, batch x context:",
        decoding_table(speed, shapes, prefill_ms),
        "Peak memory while decoding, MB, batch x context:",
        decoding_table(speed, shapes, peak_mb),
    ]


def training_table(speed, shapes):
    rows = []
    for shape, summary in shapes.items():
        for timing in speed[shape]["train"]:
            rows.append([
                shape_label(summary),
                f"{timing['step_ms']:.1f}",
                f"{timing['tok_s']:,.0f}",
                peak_mb(timing),
                f"{summary.tokens_per_sec:,.0f}",
            ])
    head = ["variant", "training step, ms", "tokens/s", "peak memory, MB",
            "tokens/s in the runs, median"]
    return table(head, rows)


def decoding_table(speed, shapes, cell_text):
    """A column for each batch and context; cell_text formats one timing of bench.py."""
    head = ["variant"]
    for timing in speed[next(iter(shapes))]["decode"]:
        head.append(f"{timing['batch_size']} x {timing['prompt_len']:,}")
    rows = []
    for shape, summary in shapes.items():
        rows.append([shape_label(summary), *map(cell_text, speed[shape]["decode"])])
    return table(head, rows)


def shape_label(summary):
    if summary.match == "params":
        return f"{summary.name} (n_ff {summary.facts['n_ff']})"
    return summary.name


def decode_ms(timing):
    return f"{timing['step_ms']:.2f}"


def prefill_ms(timing):
    return f"{timing['prefill_s'] * 1e3:,.0f}"


def peak_mb(timing):
    return f"{timing['peak_memory_bytes'] / 1e6:,.0f}"


def table(head, rows):
    """A Markdown table of cells that are texts."""
    lines = [table_line(head), "|" + "---|" * len(head)]
    for row in rows:
        lines.append(table_line(row))
    return "\n".join(lines)


def table_line(cells):
    return "| " + " | ".join(cells) + " |"


# -- pictures --------------------------------------------------------------------------------------

def draw(results, out_dir):
    """Draws the three pictures and returns their paths; without matplotlib only prints a hint."""
    try:
        import matplotlib.figure  # noqa: F401  (optional)
    except ImportError:
        print("no pictures: pip install matplotlib, then run again with --report_only=True")
        return []
    summaries = summarize(results)
    colors = {}  # a variant has one color in all pictures
    for summary in summaries:
        colors.setdefault(summary.name, f"C{len(colors)}")
    figures = {
        "curves": draw_curves(summaries, colors, results["settings"]["warmup_steps"]),
        "quality": draw_quality(summaries, colors),
        "decode": draw_decoding(summaries, colors, results["speed"]),
    }
    paths = []
    for name, figure in figures.items():
        paths.append(out_dir / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def draw_curves(summaries, colors, warmup_steps):
    """Validation loss over steps: the mean over seeds, and a band from the best to the worst."""
    matches = matches_of(summaries)
    figure, axes = new_figure(len(matches))
    for axis, match in zip(axes, matches, strict=True):
        for summary in with_match(summaries, match):
            draw_curve(axis, summary, colors[summary.name], warmup_steps)
        axis.set(title=equal(match), xlabel="step",
                 ylabel="validation loss, nats per token (band: all seeds)")
        axis.legend()
    return figure


def draw_curve(axis, summary, color, warmup_steps):
    """Draws a variant from the end of its warm-up, where losses of all variants are in range."""
    last_step = summary.mean_curve[-1][0]
    if warmup_steps > last_step:
        warmup_steps = 0
    steps = []
    means = []
    lowest = []
    highest = []
    for (step, mean), *points in zip(summary.mean_curve, *summary.curves, strict=False):
        if step < warmup_steps:
            continue
        losses = [loss for _, loss in points]
        steps.append(step)
        means.append(mean)
        lowest.append(min(losses))
        highest.append(max(losses))
    axis.plot(steps, means, color=color, label=summary.name)
    axis.fill_between(steps, lowest, highest, color=color, alpha=0.2, linewidth=0)


def draw_quality(summaries, colors):
    """Validation loss over the size of the cache."""
    matches = matches_of(summaries)
    figure, axes = new_figure(len(matches))
    sizes = {summary.facts["kv_bytes_per_token"] for summary in summaries}
    for axis, match in zip(axes, matches, strict=True):
        for summary in with_match(summaries, match):
            axis.errorbar(summary.facts["kv_bytes_per_token"], summary.loss.mean,
                          yerr=summary.loss.error, marker="o", capsize=4,
                          color=colors[summary.name], label=summary.name)
        axis.set(title=equal(match), xlabel="KV cache, bytes per token", xscale="log",
                 ylabel="validation loss, mean ± standard error")
        axis.set_xticks(sorted(sizes), minor=False)
        axis.set_xticks([], minor=True)
        axis.xaxis.set_major_formatter(with_commas)
        axis.legend()
    return figure


def draw_decoding(summaries, colors, speed):
    """Time of a decode step over the context, one axis for each batch size."""
    shapes = by_shape(with_match(summaries, summaries[0].match))
    cells = speed[summaries[0].shape]["decode"]
    batches = sorted(set(column(cells, "batch_size")))
    figure, axes = new_figure(len(batches))
    for axis, batch in zip(axes, batches, strict=True):
        for shape, summary in shapes.items():
            timings = [cell for cell in speed[shape]["decode"] if cell["batch_size"] == batch]
            draw_decode_times(axis, timings, colors[summary.name], summary.name)
        contexts = [cell["prompt_len"] for cell in cells if cell["batch_size"] == batch]
        axis.set(title=f"batch {batch}", xlabel="context, tokens", xscale="log", yscale="log",
                 ylabel="decode step, ms (dotted: reading every byte once)", xticks=contexts)
        axis.xaxis.set_major_formatter(with_commas)
        axis.minorticks_off()
        axis.legend()
    return figure


def draw_decode_times(axis, timings, color, label):
    contexts = column(timings, "prompt_len")
    axis.plot(contexts, column(timings, "step_ms"), marker="o", color=color, label=label)
    if all(column(timings, "mbu")):  # None where the memory bandwidth is unknown
        # mbu is the share of the bandwidth that a step uses: step_ms * mbu is the shortest possible
        fastest = [timing["step_ms"] * timing["mbu"] for timing in timings]
        axis.plot(contexts, fastest, linestyle=":", color=color)


def new_figure(n):
    """A figure with n axes side by side, and the axes."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5.5 * n, 4), layout="constrained")
    return figure, figure.subplots(1, n, squeeze=False)[0]


def matches_of(summaries):
    """The matchings, each once, in order."""
    return list(dict.fromkeys(summary.match for summary in summaries))


def equal(match):
    return {"shape": "equal shape", "params": "equal parameters"}[match]


def with_commas(value, position):
    """Formats a tick of an axis: matplotlib passes its value and position."""
    return f"{value:,.0f}"


# -- everything ------------------------------------------------------------------------------------

def write_report(results, out_dir):
    """Writes report.md and the pictures into out_dir and prints the report."""
    pictures = draw(results, out_dir)
    path = out_dir / "report.md"
    text = report(results, pictures)
    path.write_text(text)
    print(text)
    written = [path, out_dir / "results.json", *pictures]
    print(f"written: {', '.join(map(str, written))}")

"""Tables and pictures of a comparison, from the content of its results.json."""
import itertools
import statistics
import textwrap
from dataclasses import dataclass
from typing import NamedTuple

from nanogqa.estimates import (
    Difference,
    Estimate,
    estimate_differences,
    mean_over_seeds,
    paired,
    steps_to,
)
from nanogqa.files import replacing
from nanogqa.published import PUBLISHED, relative_differences

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
    bits_per_byte: float | None   # None where the loss counts answers alone
    metrics: dict                 # {name: Estimate} of the metrics beyond loss and bits per byte
    difference: Difference | None  # to the first variant's loss; None for the first
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
    samples = {}  # {shape: paired differences}: one model in both matchings is one comparison
    for (match, _), records in groups.items():
        first.setdefault(match, records)
        if records is not first[match]:
            samples[records[0]["shape"]] = paired(column(records, "val_loss"),
                                                  column(first[match], "val_loss"))
    differences = estimate_differences(samples)
    summaries = []
    for (match, _), records in groups.items():
        difference = None
        if records is not first[match]:
            difference = differences[records[0]["shape"]]
        summaries.append(summarize_variant(records, first[match], difference))
    return summaries


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
        shape=records[0]["shape"],
        facts=records[0],
        is_first=records is first,
        loss=mean_over_seeds(column(records, "val_loss")),
        bits_per_byte=bits_per_byte,
        metrics=summarize_metrics(records),
        difference=difference,
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


def compared(summaries):
    """The summaries that are compared to a first variant, each model once."""
    return by_shape([summary for summary in summaries if not summary.is_first]).values()


def by_shape(summaries):
    """{shape: its first summary}: a variant that is one model in both matchings counts once."""
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
    "of equal name and shape. Their intervals are Student's: each one has a confidence of 95 % by "
    "itself. The wider ones of the next column hold all together with 95 % (Bonferroni). The "
    "verdict is that of the adjusted p value, which is below 0.05 where a difference is found "
    "(Holm): with a chance of 95 %, no difference is found in the whole report where there is none."
    " Steps are read off the mean curve by linear interpolation, and only where a difference is "
    "found; their time counts training steps alone."
)
ABOUT_RESOLUTION = (
    "There is one row for each model that is compared to {first}, also if it is in both matchings. "
    "Found with 80 % power means: if the true difference is this large, and seeds vary as they did "
    "here, 80 of 100 such comparisons find it. With few seeds, how much they vary is itself "
    "uncertain. Published differences are compared in % of the loss of MHA: that is the same per "
    "token and per byte. Each was measured with one seed, so its own error is unknown:"
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
            blocks += [f"## {title}", quality_table(matched)]
            if len(matched) > 1:
                blocks.append(difference_table(matched, results["speed"]))
    blocks += [ABOUT_QUALITY, "## What this run can resolve", *resolution(summaries)]
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


def quality_table(summaries):
    """Costs and losses of the variants of one matching."""
    first = summaries[0]
    metrics = metric_names(summaries)
    head = ["variant", "n_ff", "parameters", "without embedding", "training FLOPs per token",
            "cache, bytes per token", "validation loss"]
    in_bits = all(summary.bits_per_byte is not None for summary in summaries)
    if in_bits:
        head.append("bits per byte")
    for name in metrics:
        head.append(shown_name(name))
    rows = []
    for summary in summaries:
        row = cost_cells(summary, first.facts["params"])
        row.append(summary.loss.text())
        if in_bits:
            row.append(f"{summary.bits_per_byte:.4f}")
        for name in metrics:
            row.append(metric_cell(summary, name))
        rows.append(row)
    return table(head, rows)


def difference_table(summaries, speed):
    """Differences of the variants of one matching to its first."""
    name = summaries[0].name
    head = ["variant", f"loss minus that of {name}, 95 % interval", "all intervals together",
            "p (Holm)", "verdict", f"steps to the loss of {name}"]
    rows = []
    for summary in summaries:
        rows.append([summary.name, *difference_cells(summary), steps_cell(summary, speed)])
    return table(head, rows)


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
    """A difference, its interval together with all others, p and verdict; empty for the first."""
    difference = summary.difference
    if difference is None:
        return ["", "", "", ""]
    cells = [difference.text(), half_cell(difference.half_together), "", difference.verdict]
    if difference.p_holm is not None:
        cells[2] = f"{difference.p_holm:.3f}"
        if difference.p_holm < 0.001:
            cells[2] = "< 0.001"
    return cells


def half_cell(half):
    """Half the width of an interval; empty where one seed gives none."""
    if half is None:
        return ""
    return f"± {half:.4f}"


def steps_cell(summary, speed):
    """Steps and seconds until the first variant's final loss; "same" where no difference is found.
    """
    if summary.difference and summary.difference.p_holm is None:
        return "unknown"
    if summary.difference and not summary.difference.found:
        return "same"
    steps = summary.steps_to_first
    if steps is None:
        return "never"
    step_ms = speed[summary.shape]["train"][0]["step_ms"]
    return f"{steps:,.0f} ({steps * step_ms / 1e3:,.0f} s)"


def resolution(summaries):
    """Blocks of text: which differences this comparison can find, and which are published."""
    first = summaries[0]
    published = relative_differences()
    rows = []
    for summary in compared(summaries):
        difference = summary.difference
        if difference.half is None:
            continue
        share = difference.detectable / first.loss.mean
        count = sum(size >= share for size in published)
        rows.append([shape_label(summary), half_cell(difference.half),
                     half_cell(difference.half_together), f"{difference.detectable:.4f}",
                     f"{100 * share:.1f}", f"{count} of {len(published)}"])
    if not rows:
        return ["One seed, or one variant, gives no error bar: any difference above may be due to "
                "chance."]
    head = ["variant", "95 % interval", "all intervals together", "found with 80 % power",
            f"in % of the loss of {first.name}", "published differences at least as large"]
    return [table(head, rows), ABOUT_RESOLUTION.format(first=first.name), published_table()]


def published_table():
    """Published differences to MHA and their sources."""
    variants = list(PUBLISHED[0].perplexity)[1:]
    head = ["source", "parameters, million", "tokens, billion", "parameters equal"]
    for variant in variants:
        head.append(f"{variant} minus MHA, nats per token")
    rows = []
    for row in PUBLISHED:
        matched = "no"
        if row.matched:
            matched = "yes"
        cells = [f"[{row.paper}]({row.url}), {row.table}", f"{row.params / 1e6:,.0f}",
                 f"{row.tokens / 1e9:.0f}", matched]
        for variant in variants:
            cells.append(published_cell(row, variant))
        rows.append(cells)
    return table(head, rows)


def published_cell(row, variant):
    if variant not in row.perplexity:
        return ""
    return f"{row.difference(variant):+.3f} ({100 * row.relative_difference(variant):+.1f} %)"


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
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# -- pictures --------------------------------------------------------------------------------------

STYLE = {"font.size": 13, "axes.titlesize": 13, "axes.labelsize": 13, "lines.linewidth": 2,
         "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}


def draw(results, out_dir):
    """Draws the pictures and returns their paths; without matplotlib only prints a hint."""
    try:
        import matplotlib
        import matplotlib.figure  # noqa: F401  (optional)
    except ImportError:
        print("no pictures: pip install matplotlib, then run again with --report_only=True")
        return []
    summaries = summarize(results)
    colors = {}  # a variant has one color in all pictures
    for summary in summaries:
        colors.setdefault(summary.name, f"C{len(colors)}")
    with matplotlib.rc_context(STYLE):
        figures = {
            "curves": draw_curves(summaries, colors, results["settings"]["warmup_steps"]),
            "quality": draw_quality(summaries, colors),
            "decode": draw_decoding(summaries, colors, results),
        }
        if metric_names(summaries):
            figures["metrics"] = draw_metrics(summaries, colors)
        paths = []
        for name, figure in figures.items():
            paths.append(out_dir / f"{name}.png")
            figure.savefig(paths[-1], dpi=120)
    return paths


def draw_curves(summaries, colors, warmup_steps):
    """Loss minus that of the first variant over steps, an axis for each matching: the mean over
    seeds, and a band from the lowest to the highest."""
    matches = matches_of(summaries)
    first = summaries[0].name
    figure, axes = new_figure(len(matches), colors)
    last_step = summaries[0].mean_curve[-1][0]
    cut = f", after the warm-up of {warmup_steps:,} steps"
    if warmup_steps > last_step:
        warmup_steps = 0
        cut = ""
    for axis, match in zip(axes, matches, strict=True):
        matched = with_match(summaries, match)
        axis.axhline(0, color=colors[first])
        ends = [(0.0, first, colors[first])]
        for summary in matched[1:]:
            end = draw_curve(axis, paired_curves(summary, matched[0], warmup_steps),
                             colors[summary.name])
            ends.append((end, summary.name, colors[summary.name]))
        axis.set(title=equal(match), xlabel=f"step{cut}")
        axis.label_ends = ends
    axes[0].set_ylabel(minus(first))
    for axis in axes:  # once all are drawn: they share the range of y
        label_lines(axis, axis.label_ends)
    figure.suptitle("Learning curves, paired by seed: mean, and range of the seeds", fontsize=14)
    return figure


def paired_curves(summary, first, start):
    """[(step, differences to the first variant's losses, one for each seed)], from step start."""
    points = []
    for mine, theirs in zip(zip(*summary.curves, strict=True), zip(*first.curves, strict=True),
                            strict=True):
        step = mine[0][0]
        differences = [a[1] - b[1] for a, b in zip(mine, theirs, strict=True)]
        if step >= start:
            points.append((step, differences))
    return points


def draw_curve(axis, points, color):
    """Draws the points of one variant and returns the last mean."""
    steps = [step for step, _ in points]
    means = [statistics.mean(differences) for _, differences in points]
    lowest = [min(differences) for _, differences in points]
    highest = [max(differences) for _, differences in points]
    axis.plot(steps, means, color=color, marker=".")
    axis.fill_between(steps, lowest, highest, color=color, alpha=0.15, linewidth=0)
    return means[-1]


def draw_quality(summaries, colors):
    """Final loss minus that of the first variant, an axis for each matching and a line for each
    variant."""
    matches = matches_of(summaries)
    first = summaries[0]
    figure, axes = new_figure(len(matches), colors, lines=len(colors))
    labels = {}
    for axis, match in zip(axes, matches, strict=True):
        matched = with_match(summaries, match)
        axis.axvline(0, color=colors[first.name], linewidth=1)
        for place, summary in enumerate(matched):
            labels[place] = f"{summary.name}\n{summary.facts['kv_bytes_per_token']:,}"
            differences = paired_curves(summary, matched[0], 0)[-1][1]
            draw_differences(axis, place, summary, differences, colors[summary.name])
        axis.set(title=equal(match), xlabel=minus(first.name))
    axes[0].set_yticks(list(labels), labels.values())
    axes[0].set(ylim=(len(labels) - 0.5, -0.5), ylabel="KV cache, bytes per token")
    seeds = len(first.curves)
    text = (f"Final loss, paired by seed; dots are the {seeds} seeds. 95 % intervals:\nthick, each "
            "by itself; thin, all together")
    if seeds == 1:
        text = "Final loss of one seed, which gives no interval"
    figure.suptitle(text, fontsize=14)
    return figure


def draw_differences(axis, place, summary, differences, color):
    """The mean difference of a variant, its two intervals, and below them a dot for each seed."""
    if summary.is_first:
        axis.plot(0, place, marker="D", color=color)
        return
    mean = summary.difference.mean
    axis.errorbar(mean, place, xerr=summary.difference.half_together, marker="D", capsize=5,
                  color=color, elinewidth=1.5)
    axis.errorbar(mean, place, xerr=summary.difference.half, color=color, elinewidth=7,
                  alpha=0.5)
    axis.plot(differences, [place + 0.25] * len(differences), marker="o", linestyle="", alpha=0.6,
              color=color, markersize=5)


def draw_metrics(summaries, colors):
    """The metrics beyond loss and bits per byte at the end of training: an axis for each metric and
    matching, and a line for each variant that has the metric."""
    matches = matches_of(summaries)
    names = metric_names(summaries)
    variants = list(colors)
    figure, axes = new_figure(len(names) * len(matches), colors, len(colors), sharex=False)
    for axis, (name, match) in zip(axes, itertools.product(names, matches), strict=True):
        for summary in with_match(summaries, match):
            if name in summary.metrics:
                mean, error = summary.metrics[name]
                axis.errorbar(mean, variants.index(summary.name), xerr=error, marker="D",
                              capsize=5, color=colors[summary.name])
        axis.set(title=equal(match), xlabel=shown_name(name))
    axes[0].set_yticks(range(len(variants)), variants)
    axes[0].set_ylim(len(variants) - 0.5, -0.5)
    figure.suptitle("At the end: mean over seeds ± standard error", fontsize=14)
    return figure


def draw_decoding(summaries, colors, results):
    """Time of a decode step over the context, an axis for each batch size."""
    speed = results["speed"]
    shapes = by_shape(with_match(summaries, summaries[0].match))
    cells = speed[summaries[0].shape]["decode"]
    batches = sorted(set(column(cells, "batch_size")))
    figure, axes = new_figure(len(batches), colors)
    floor = bandwidth_beyond_cache(results)
    for axis, batch in zip(axes, batches, strict=True):
        axis.label_ends = []
        for shape, summary in shapes.items():
            timings = [cell for cell in speed[shape]["decode"] if cell["batch_size"] == batch]
            timings.sort(key=context)
            draw_decode_times(axis, timings, colors[summary.name], floor)
            axis.label_ends.append(
                (timings[-1]["step_ms"], summary.name, colors[summary.name]))
        axis.set(title=f"batch {batch}", xlabel="context, tokens (log scale)", xscale="log",
                 yscale="log")
        axis.set_xticks(sorted({cell["prompt_len"] for cell in cells}))
        axis.xaxis.set_major_formatter(with_commas)
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.grid(axis="y", which="both", color="0.9")
    axes[0].set_ylabel("milliseconds per step (log scale)")
    few_ticks(axes[0])
    for axis in axes:
        label_lines(axis, axis.label_ends)
    machine = results["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    text = f"Decoding on {where}, {machine['dtype']}, random weights"
    if floor:
        text += f"\ndotted: reading every byte once, at {floor.bytes_per_s / 1e9:.0f} GB/s"
    figure.suptitle(text, fontsize=14)
    return figure


def few_ticks(axis):
    """Labels 1, 2 and 5 times the powers of ten on the axes, whose range of y is shared."""
    from matplotlib.ticker import LogLocator, NullFormatter
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(plain)
    axis.yaxis.set_minor_formatter(NullFormatter())


class Floor(NamedTuple):
    """How fast steps can be that read more than the processor's cache holds."""
    bytes_per_s: float            # one bandwidth for all: the highest that was measured
    cache_bytes: int              # of the processor


def bandwidth_beyond_cache(results):
    """The Floor of these results; None where the bandwidth or the cache is unknown."""
    rates = []
    for rows in results["speed"].values():
        for row in rows["decode"]:
            if row["mbu"]:  # the share of the bandwidth that the step has used
                rates.append(row["bytes_per_step"] / (row["step_ms"] / 1e3) / row["mbu"])
    cache_bytes = results["machine"].get("cache_bytes")  # older results lack it
    if not rates or not cache_bytes:
        return None
    return Floor(max(rates), cache_bytes)


def draw_decode_times(axis, timings, color, floor):
    axis.plot(column(timings, "prompt_len"), column(timings, "step_ms"), marker="o", color=color)
    if floor:
        beyond = [cell for cell in timings if cell["bytes_per_step"] > floor.cache_bytes]
        fastest = [cell["bytes_per_step"] / floor.bytes_per_s * 1e3 for cell in beyond]
        axis.plot(column(beyond, "prompt_len"), fastest, linestyle=":", marker=".", color=color)


def new_figure(n, names, lines=6, sharex=True):
    """A figure with n axes side by side that share their ranges (of x if sharex), and the axes.

    There is room for the longest of the names beside each, and for that many lines of two rows.
    """
    from matplotlib.figure import Figure
    longest = max(map(len, names))
    size = (max(8, n * (4.9 + 0.12 * longest)), max(4.6, 1.6 + 0.55 * lines))
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, n, squeeze=False, sharex=sharex, sharey=True)[0]


def minus(name):
    """The label of an axis of differences to the variant of that name."""
    text = textwrap.fill(f"validation loss minus {name},", 28, break_long_words=False,
                         break_on_hyphens=False)
    return f"{text}\nnats per token"


def label_lines(axis, ends):
    """Writes the names of lines at their right ends; ends are (last y, name, color).

    Names that would overlap are moved apart.
    """
    to_fraction = axis.transScale + axis.transLimits  # data to fractions of the axes
    places = [(to_fraction.transform((1, y))[1], name, color) for y, name, color in ends]
    places.sort()
    heights = apart([height for height, _, _ in places], 0.065)
    for height, (_, name, color) in zip(heights, places, strict=True):
        axis.text(1.02, height, name, color=color, transform=axis.transAxes, va="center")


def apart(heights, gap):
    """Ascending heights, moved so that neighbors are at least gap apart and centered as before."""
    groups = []  # [sum of heights, count] of neighbors that touch
    for height in heights:
        groups.append([height, 1])
        while len(groups) > 1:
            (below, n), (above, m) = groups[-2:]
            if above / m - below / n >= gap * (n + m) / 2:
                break
            groups[-2:] = [[below + above, n + m]]
    moved = []
    for total, n in groups:
        for i in range(n):
            moved.append(total / n + gap * (i - (n - 1) / 2))
    return moved


def matches_of(summaries):
    """The matchings, each once, in order."""
    return list(dict.fromkeys(summary.match for summary in summaries))


def equal(match):
    return {"shape": "equal shape", "params": "equal parameters"}[match]


def with_commas(value, position):
    """Formats a tick of an axis: matplotlib passes its value and position."""
    return f"{value:,.0f}"


def plain(value, position):
    """As with_commas, for values that may be below 1."""
    return f"{value:g}"


def context(timing):
    return timing["prompt_len"]


# -- everything ------------------------------------------------------------------------------------

def write_report(results, out_dir):
    """Writes report.md and the pictures into out_dir and prints the report."""
    pictures = draw(results, out_dir)
    path = out_dir / "report.md"
    text = report(results, pictures)
    with replacing(path, errors="surrogateescape") as file:  # the data set's path may hold any byte
        file.write(text)
    print(text)
    written = [path, out_dir / "results.json", *pictures]
    print(f"written: {', '.join(map(str, written))}")

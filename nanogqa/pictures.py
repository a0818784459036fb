"""Pictures of a comparison, from the content of its results.json. They need matplotlib."""
import itertools
import statistics
import textwrap
from typing import NamedTuple

from nanogqa.costs import CONTEXT
from nanogqa.estimates import mean_over_seeds
from nanogqa.summary import (
    by_key,
    cache_bytes,
    column,
    matches_of,
    metric_names,
    shown_name,
    summarize,
    unit_of,
    with_match,
)

STYLE = {"font.size": 13, "axes.titlesize": 13, "axes.labelsize": 13, "lines.linewidth": 2,
         "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}


PICTURES = ("curves", "quality", "decode", "metrics", "front")  # what draw may write, without .png


def draw(results, out_dir):
    """Draws the pictures and returns their paths; without matplotlib only prints a hint."""
    try:
        import matplotlib
        import matplotlib.figure  # noqa: F401  (optional)
    except ImportError:
        print("no pictures: pip install matplotlib, then run again with --report_only=True")
        return []
    summaries = summarize(results)
    colors = colors_of(matplotlib, summaries)
    with matplotlib.rc_context(STYLE):
        figures = {
            "curves": draw_curves(summaries, colors, results["settings"]["warmup_steps"]),
            "quality": draw_quality(summaries, colors),
            "decode": draw_decoding(summaries, colors, results),
        }
        if metric_names(summaries):
            figures["metrics"] = draw_metrics(summaries, colors)
        if len({cache_bytes(summary) for summary in summaries}) > 1:
            figures["front"] = draw_fronts(summaries, colors, results)
        paths = []
        for name, figure in figures.items():
            paths.append(out_dir / f"{name}.png")
            figure.savefig(paths[-1], dpi=120)
    return paths


def colors_of(matplotlib, summaries):
    """{name: color}: a variant has one color in all pictures."""
    names = list(dict.fromkeys(summary.name for summary in summaries))
    if len(names) <= 10:
        return {name: f"C{i}" for i, name in enumerate(names)}
    shades = matplotlib.colormaps["turbo"]  # the colors C0 to C9 begin again with C10
    return {name: shades(i / (len(names) - 1)) for i, name in enumerate(names)}


def draw_curves(summaries, colors, warmup_steps):
    """Loss minus that of the first variant over steps, an axis for each matching: the mean over
    seeds, and a band from the lowest to the highest."""
    matches = matches_of(summaries)
    first = summaries[0].name
    figure, axes = new_figure(len(matches), colors)
    last_step = summaries[0].mean_curve[-1][0]
    cut = f", after the warm-up of {warmup_steps:,} steps"
    if not 0 < warmup_steps <= last_step:
        warmup_steps = 0
        cut = ""
    ends_of = []  # of each axis: (last y, name, color) of its lines
    for axis, match in zip(axes, matches, strict=True):
        matched = with_match(summaries, match)
        axis.axhline(0, color=colors[first])
        ends = [(0.0, first, colors[first])]
        for summary in matched[1:]:
            end = draw_curve(axis, paired_curves(summary, matched[0], warmup_steps),
                             colors[summary.name])
            ends.append((end, summary.name, colors[summary.name]))
        axis.set(title=equal(match), xlabel=f"step{cut}")
        ends_of.append(ends)
    axes[0].set_ylabel(minus(first))
    for axis, ends in zip(axes, ends_of, strict=True):  # once all are drawn: they share y
        label_lines(axis, ends)
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
            labels[place] = f"{summary.name}\n{cache_bytes(summary) / 1e3:,.0f}"
            differences = paired_curves(summary, matched[0], 0)[-1][1]
            draw_differences(axis, place, summary, differences, colors[summary.name])
        axis.set(title=equal(match), xlabel=minus(first.name))
    axes[0].set_yticks(list(labels), labels.values())
    axes[0].set(ylim=(len(labels) - 0.5, -0.5), ylabel=f"cache of {CONTEXT:,} tokens, kB")
    seeds = len(first.curves)
    text = (f"Final loss, paired by seed; dots are the {seeds} seeds. 95 % intervals:\nthick, each "
            "by itself; thin, all together")
    if seeds == 1:
        text = "Final loss of one seed, which gives no interval"
    if len(labels) == 1:
        text = "One variant: nothing is compared"
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
    draw_seeds(axis, differences, [place + 0.25] * len(differences), color)


def draw_seeds(axis, x, y, color):
    """A dot for each seed."""
    axis.plot(x, y, marker="o", linestyle="", alpha=0.6, color=color, markersize=5)


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
                seeds = summary.metrics[name]
                mean, error = mean_over_seeds(seeds)
                place = variants.index(summary.name)
                axis.errorbar(mean, place, xerr=error, marker="D", capsize=5,
                              color=colors[summary.name])
                draw_seeds(axis, seeds, [place + 0.25] * len(seeds), colors[summary.name])
        axis.set(title=equal(match), xlabel=shown_name(name))
    axes[0].set_yticks(range(len(variants)), variants)
    axes[0].set_ylim(len(variants) - 0.5, -0.5)
    text = "At the end: mean over seeds ± standard error; dots are the seeds"
    if len(summaries[0].curves) == 1:
        text = "At the end of one seed, which gives no error"
    figure.suptitle(text, fontsize=14)
    return figure


def draw_decoding(summaries, colors, results):
    """Time of a decode step over the context, an axis for each batch size."""
    speed = results["speed"]
    models = by_key(with_match(summaries, summaries[0].match))
    cells = speed[summaries[0].key]["decode"]
    batches = sorted(set(column(cells, "batch_size")))
    figure, axes = new_figure(len(batches), colors)
    floor = bandwidth_beyond_cache(results)
    ends_of = []  # of each axis: (last y, name, color) of its lines
    for axis, batch in zip(axes, batches, strict=True):
        ends = []
        for key, summary in models.items():
            timings = [cell for cell in speed[key]["decode"] if cell["batch_size"] == batch]
            timings.sort(key=context)
            draw_decode_times(axis, timings, colors[summary.name], floor)
            ends.append((timings[-1]["step_ms"], summary.name, colors[summary.name]))
        ends_of.append(ends)
        axis.set(title=f"batch {batch}", xlabel="context, tokens (log scale)", xscale="log",
                 yscale="log")
        axis.set_xticks(sorted({cell["prompt_len"] for cell in cells}))
        axis.xaxis.set_major_formatter(with_commas)
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.grid(axis="y", which="both", color="0.9")
    axes[0].set_ylabel("milliseconds per step (log scale)")
    few_ticks(axes[0].yaxis)  # the axes share their range of y
    for axis, ends in zip(axes, ends_of, strict=True):
        label_lines(axis, ends)
    machine = results["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    text = f"Decoding on {where}, {machine['dtype']}, random weights"
    if floor:
        text += f"\ndotted: reading every byte once, at {floor.bytes_per_s / 1e9:.0f} GB/s"
    figure.suptitle(text, fontsize=14)
    return figure


def few_ticks(axis, formatter=None):
    """Labels 1, 2 and 5 times the powers of ten on an x or y axis with a log scale."""
    from matplotlib.ticker import LogLocator, NullFormatter
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(formatter or plain)
    axis.set_minor_formatter(NullFormatter())


class Point(NamedTuple):
    """A variant in a picture of a front."""
    size: int                     # bytes that it caches
    value: float
    name: str
    error: float | None = None    # half of its error bar
    seeds: tuple = ()             # values of the seeds


class Panel(NamedTuple):
    """An axis of a picture of fronts."""
    label: str
    points: list
    lower: bool | None            # whether lower is better; None: no front is drawn


def draw_fronts(summaries, colors, results):
    """Loss, further metrics and time of a decode step against cached bytes, an axis for each."""
    panels = []
    for match in matches_of(summaries):
        matched = with_match(summaries, match)
        label = f"loss, nats per {unit_of(matched[0])}, {equal(match)}"
        panels.append(Panel(label, loss_points(matched), True))
        for name in metric_names(matched):
            label = f"{shown_name(name)}, {equal(match)}"
            panels.append(Panel(label, metric_points(matched, name), name != "val_acc"))
    panels.append(time_panel(by_key(with_match(summaries, summaries[0].match)), results))
    return draw_panels(panels, colors, summaries[0].name)


def draw_panels(panels, colors, first):
    """Panels side by side. A dotted line goes through the variants that no other one beats in
    cached bytes and in the mean over seeds; first is the variant that the others are compared to.
    """
    figure, axes = new_figure(len(panels), colors, lines=8, sharey=False)
    for axis, panel in zip(axes, panels, strict=True):
        draw_points(axis, panel.points, colors)
        if panel.lower is not None:
            sizes, values = [], []
            for point in front(panel.points, panel.lower):
                sizes.append(point.size)
                values.append(point.value)
            axis.plot(sizes, values, linestyle=":", color="0.5", zorder=0)
        xlabel = f"cache of {CONTEXT:,} tokens, kB (log scale)"
        axis.set(title=panel.label, xlabel=xlabel, xscale="log")
        axis.margins(x=0.25, y=0.15)
        few_ticks(axis.xaxis, kilobytes)
    figure.suptitle(about_panels(panels, first), fontsize=14)
    if max(map(len, colors)) > LONGEST_BESIDE:
        name_below(figure, colors)
        return figure
    figure.draw_without_rendering()  # the axes get their sizes, which name_points needs
    for axis, panel in zip(axes, panels, strict=True):
        name_points(axis, panel.points, colors)
    return figure


def about_panels(panels, first):
    """The title of the picture: what its bars, dots and lines are."""
    bars = dots = line = False
    for panel in panels:
        line = line or panel.lower is not None
        for point in panel.points:
            bars = bars or bool(point.error)
            dots = dots or bool(point.seeds)
    text = "Against cached bytes."
    if bars:
        text += f" Bars: 95 % interval of the difference to {first}, each by itself."
    if dots:
        text += " Small dots: seeds."
    if line:
        text += ("\nDotted line: no other variant is at least as good in both and better in one, "
                 "by the means over seeds")
    return text


def loss_points(summaries):
    points = []
    for summary in summaries:
        error = None
        if summary.difference is not None:
            error = summary.difference.half
        points.append(Point(cache_bytes(summary), summary.loss.mean, summary.name, error))
    return points


def metric_points(summaries, name):
    points = []
    for summary in summaries:
        if name in summary.metrics:
            seeds = summary.metrics[name]
            mean = mean_over_seeds(seeds).mean
            points.append(Point(cache_bytes(summary), mean, summary.name, seeds=tuple(seeds)))
    return points


def time_panel(models, results):
    """Times of the decode step with the largest batch and the longest context. They have no front:
    two rounds of timing give no error bar and cannot order close times."""
    points = []
    for key, summary in models.items():
        largest = max(results["speed"][key]["decode"], key=batch_and_context)
        batch_size, prompt_len = batch_and_context(largest)  # the same for every model
        points.append(Point(cache_bytes(summary), largest["step_ms"], summary.name))
    label = f"ms per step, batch {batch_size}, context {prompt_len:,}"
    return Panel(label, points, None)


def batch_and_context(timing):
    return timing["batch_size"], timing["prompt_len"]


def draw_points(axis, points, colors):
    """Points with their error bars or seeds."""
    for point in points:
        axis.errorbar(point.size, point.value, yerr=point.error, marker="D", capsize=4,
                      elinewidth=1.5, color=colors[point.name])
        draw_seeds(axis, [point.size] * len(point.seeds), point.seeds, colors[point.name])


# where a name may stand beside its point: x and y offset in points, horizontal alignment
BESIDE = ((6, 6, "left"), (-6, 6, "right"), (6, -16, "left"), (-6, -16, "right"))


LONGEST_BESIDE = 20  # characters of a name that has room beside its point


def name_below(figure, colors):
    """Writes the names with their colors below all axes."""
    from matplotlib.lines import Line2D
    handles = []
    for name, color in colors.items():
        handles.append(Line2D([], [], marker="D", linestyle="", color=color, label=name))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)


def name_points(axis, points, colors):
    """Writes the name of each point beside it, in the first place where no other name is."""
    taken = []
    for point in sorted(points):
        text = axis.annotate(point.name, (point.size, point.value), xytext=(0, 0),
                             textcoords="offset points", color=colors[point.name], fontsize=11)
        for x, y, side in BESIDE:
            text.set(position=(x, y), ha=side)
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def front(points, lower):
    """The points that no other one beats in both size and value, by size."""
    best = []
    for point in sorted(points):
        if not any(beats(other, point, lower) for other in points):
            best.append(point)
    return best


def beats(other, point, lower):
    """Whether other is at least as good as point in size and value, and better in one of them."""
    gain = point.value - other.value
    if not lower:
        gain = -gain
    saved = point.size - other.size
    return gain >= 0 and saved >= 0 and gain + saved > 0


class Floor(NamedTuple):
    """How fast steps can be that read more than the processor's cache holds."""
    bytes_per_s: float            # one bandwidth for all: the highest that was measured
    processor_cache: int          # bytes


def bandwidth_beyond_cache(results):
    """The Floor of these results; None where the bandwidth or the cache is unknown, or where the
    cache holds all that a step reads."""
    rates, largest = [], 0
    for rows in results["speed"].values():
        for row in rows["decode"]:
            largest = max(largest, row["bytes_per_step"])
            if row["mbu"]:  # the share of the bandwidth that the step has used
                rates.append(row["bytes_per_step"] / (row["step_ms"] / 1e3) / row["mbu"])
    processor_cache = results["machine"].get("cache_bytes")  # older results lack it
    if not rates or not processor_cache or largest <= processor_cache:
        return None
    return Floor(max(rates), processor_cache)


def draw_decode_times(axis, timings, color, floor):
    axis.plot(column(timings, "prompt_len"), column(timings, "step_ms"), marker="o", color=color)
    if floor:
        beyond = [cell for cell in timings if cell["bytes_per_step"] > floor.processor_cache]
        fastest = [cell["bytes_per_step"] / floor.bytes_per_s * 1e3 for cell in beyond]
        axis.plot(column(beyond, "prompt_len"), fastest, linestyle=":", marker=".", color=color)


def new_figure(n, names, lines=6, sharex=True, sharey=True):
    """A figure with n axes side by side, which share ranges unless told otherwise, and the axes.

    There is room for the longest of the names beside each, and for that many lines of two rows.
    """
    from matplotlib.figure import Figure
    longest = max(map(len, names))
    size = (max(8, n * (4.9 + 0.12 * longest)), max(4.6, 1.6 + 0.55 * lines))
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, n, squeeze=False, sharex=sharex, sharey=sharey)[0]


def minus(name):
    """The label of an axis of differences to the variant of that name."""
    text = textwrap.fill(f"validation loss minus {name},", 28, break_long_words=False,
                         break_on_hyphens=False)
    return f"{text}\nin nats"


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


def equal(match):
    return {"shape": "equal shape", "params": "equal parameters"}[match]


def with_commas(value, position):
    """Formats a tick of an axis: matplotlib passes its value and position."""
    return f"{value:,.0f}"


def kilobytes(value, position):
    """As with_commas, for bytes."""
    return f"{value / 1e3:,.0f}"


def plain(value, position):
    """As with_commas, for values that may be below 1."""
    return f"{value:g}"


def context(timing):
    return timing["prompt_len"]

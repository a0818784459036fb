"""The tables of a comparison as report.md, from the content of its results.json."""
import re

from nanogqa.configurator import plural
from nanogqa.costs import CONTEXT
from nanogqa.estimates import ALPHA, mean_over_seeds, smallest_p
from nanogqa.files import replacing
from nanogqa.pictures import PICTURES, draw
from nanogqa.published import PUBLISHED, VARIANTS, relative_differences
from nanogqa.summary import (
    by_key,
    cache_bytes,
    compared,
    metric_names,
    shown_name,
    summarize,
    unit_of,
    with_match,
)

ABOUT_LOSSES = "Losses are in nats per {unit}, mean over seeds ± standard error."
ABOUT_DIFFERENCES = (
    "Differences are between runs with the same seed, which share the order of the data and the "
    "initial value of every weight of equal name and shape. Their intervals are Student's: each "
    "one has a confidence of 95 % by itself. The wider ones of the next column all contain the "
    "true difference with a confidence of at least 95 % (Bonferroni). Both assume that the "
    "differences of seeds are about normally distributed."
)
ABOUT_VERDICTS = (
    "The verdict is Holm's test: a difference is found where its adjusted p value is below 0.05. "
    "The chance that a report finds any difference where there is none is then at most 5 %. Holm's "
    "test may find a difference whose wider interval contains zero."
)
ABOUT_STUDENT = (
    "The p values are those of Student's t test, which assumes the same as the intervals."
)
ABOUT_RANKS = (
    "Where answers alone count, seeds may form groups, those that have learned the task and those "
    "that have not. So the intervals are rough, and the p values are those of an exact test of "
    "ranks (Mann and Whitney). It assumes no distribution and may disagree with an interval or "
    "with the sign of a mean. It takes all runs as independent: it is cautious if runs of one seed "
    "resemble each other, and finds too much if good seeds of one variant are bad ones of the "
    "other. With {seeds} seeds, p is at least {smallest:.2g} before Holm's correction."
)
ABOUT_STEPS = (
    "Steps are read off the mean curve by linear interpolation. Their time counts training steps "
    "alone; with several ranks, their speeds are taken to add up. \"same\" means that no "
    "difference was found, \"unknown\" that none could be."
)
ABOUT_RESOLUTION = (
    "Found with 80 % power means: if the true difference is this large, and seeds vary as they did "
    "here, at least 80 of 100 such comparisons find it. With few seeds, how much they vary is "
    "itself uncertain."
)
ABOUT_PUBLISHED = (
    "The last column counts published differences of the same kind of attention, in either "
    "matching, and those of every GQA are those of GQA-4. They are compared in % of the loss of "
    "MHA: that is the same per token and per byte. Each was measured with one seed, so its own "
    "error is unknown:"
)
ABOUT_SPEED = (
    "bench.py measures speeds and memory with random weights. It times every model in two rounds. "
    "Each time is the shorter of the two; memory is that of the round with the faster step, and "
    "excludes the imports."
)


def report(results, pictures):
    """The text of report.md; pictures are paths of files beside it."""
    summaries = summarize(results)
    first = summaries[0]
    titles = {"shape": f"Equal shape: n_ff and all settings that are not compared are those of "
                       f"{first.name}",
              "params": "Equal parameters, within 0.5 %: n_ff is adjusted to the parameters of "
                        f"{first.name}"}
    blocks = introduction(results, summaries)
    for match, title in titles.items():
        matched = with_match(summaries, match)
        if matched:
            blocks += [f"## {title}", quality_table(matched)]
            if len(matched) > 1:
                blocks.append(difference_table(matched, results))
    blocks.append(about_quality(summaries))
    blocks += ["## What this run can resolve", *resolution(summaries)]
    blocks += ["## Speed", *speed_tables(results, summaries), ABOUT_SPEED]
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
        f"# Comparison of {plural(len(variants), 'variant')}, {plural(settings['seeds'], 'seed')}",
        f"{settings['max_steps']:,} steps of {settings['tokens_per_step']:,} tokens on data set "
        f"{settings['dataset']} (sha256 {results['dataset_sha256'][:16]}), tokenizer "
        f"{results['tokenizer']}. Each run trained on {plural(machine['ranks'], 'rank')}. Timed on "
        f"one device, {device}, {plural(machine['threads'], 'thread')}, torch {machine['torch']}, "
        f"{machine['dtype']}, {results['date']}.",
    ]
    if heads:
        blocks.append("\n".join(heads.values()))
    return blocks


def about_quality(summaries):
    """What losses are and, where there are any, differences."""
    texts = [ABOUT_LOSSES.format(unit=unit_of(summaries[0]))]
    if compared(summaries) and len(summaries[0].curves) > 1:
        texts += [ABOUT_DIFFERENCES, ABOUT_VERDICTS]
        if unit_of(summaries[0]) == "answer":
            seeds = len(summaries[0].curves)
            texts.append(ABOUT_RANKS.format(seeds=seeds, smallest=smallest_p(seeds)))
        else:
            texts.append(ABOUT_STUDENT)
        texts.append(ABOUT_STEPS)
    return " ".join(texts)


def quality_table(summaries):
    """Costs and losses of the variants of one matching."""
    first = summaries[0]
    metrics = metric_names(summaries)
    head = ["variant", "n_ff", "parameters", "without embedding", "training FLOPs per token",
            "cache, bytes per token", f"cache of {CONTEXT:,} tokens, bytes", "validation loss"]
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


def difference_table(summaries, results):
    """Differences of the variants of one matching to its first."""
    name = summaries[0].name
    head = ["variant", f"loss minus that of {name}, 95 % interval", "all intervals together",
            "p (Holm)", "verdict", f"steps to the loss of {name}"]
    rows = []
    for summary in summaries:
        rows.append([summary.name, *difference_cells(summary), steps_cell(summary, results)])
    return table(head, rows)


def cost_cells(summary, first_params):
    facts = summary.facts
    return [
        summary.name,
        str(facts["n_ff"]),
        f"{facts['params']:,} ({facts['params'] / first_params - 1:+.2%})",
        f"{facts['non_embedding_params']:,}",
        f"{facts['flops_per_token']:,}",
        f"{facts['kv_bytes_per_token']:,}",
        f"{cache_bytes(summary):,}",
    ]


def metric_cell(summary, name):
    if name not in summary.metrics:
        return ""
    return mean_over_seeds(summary.metrics[name]).text()


def difference_cells(summary):
    """A difference, its interval together with all others, p and verdict; empty for the first."""
    difference = summary.difference
    if difference is None:
        return ["", "", "", ""]
    return [difference.text(), half_cell(difference.half_together), p_cell(difference.p_holm),
            difference.verdict]


def half_cell(half):
    """Half the width of an interval; empty where one seed gives none."""
    if half is None:
        return ""
    return f"± {half:.4f}"


def p_cell(p):
    """An adjusted p value; empty where one seed gives none."""
    if p is None:
        return ""
    if p < 0.001:
        return "< 0.001"
    if f"{p:.3f}" == f"{ALPHA:.3f}":  # which side of it decides the verdict
        return f"{p:.5f}"
    return f"{p:.3f}"


def steps_cell(summary, results):
    """Steps and seconds until the first variant's final loss; "same" where no difference is found,
    "unknown" where none could be."""
    if summary.difference and not summary.difference.findable:
        return "unknown"
    if summary.difference and not summary.difference.found:
        return "same"
    steps = summary.steps_to_first
    if steps is None:
        return "never"
    tokens = steps * results["settings"]["tokens_per_step"]
    rate = results["speed"][summary.key]["train"][0]["tok_s"] * results["machine"]["ranks"]
    return f"{steps:,.0f} ({tokens / rate:,.0f} s)"


def resolution(summaries):
    """Blocks of text: which differences this comparison can find and, where it compares a kind of
    attention with MHA on text, which are published."""
    first = summaries[0]
    others = list(compared(summaries))
    if not others:
        return ["One variant: nothing is compared."]
    if others[0].difference.half is None:
        return ["One seed gives no error bar: any difference above may be due to chance."]
    if unit_of(first) == "answer":
        seeds = len(first.curves)
        if not others[0].difference.findable:
            return [f"With {seeds} seeds and {plural(len(others), 'comparison')}, a test of ranks "
                    "cannot find a difference, however large: use more seeds."]
        return ["This is not estimated for a test of ranks: it depends on how seeds form groups."]
    # the loss of an answer may be nearly 0, and differences many times that
    relative = unit_of(first) == "token" and first.loss.mean > 0
    beside_published = (relative and kind_of(first) == "MHA"
                        and any(kind_of(summary) in VARIANTS for summary in others))
    head = ["variant", "95 % interval", "all intervals together", "found with 80 % power"]
    if relative:
        head.append(f"in % of the loss of {first.name}")
    if beside_published:
        head.append("published differences at least as large")
    rows = []
    for summary in others:
        difference = summary.difference
        row = [label_of(summary), half_cell(difference.half),
               half_cell(difference.half_together), f"{difference.detectable:.4f}"]
        if relative:
            row.append(f"{100 * difference.detectable / first.loss.mean:.1f}")
        if beside_published:
            row.append(published_cell(summary, first))
        rows.append(row)
    if not beside_published:
        return [table(head, rows), ABOUT_RESOLUTION]
    return [table(head, rows), f"{ABOUT_RESOLUTION} {ABOUT_PUBLISHED}", published_table()]


def published_cell(summary, first):
    """How many published differences of this kind of attention the comparison with first would
    find; empty for a kind without any, and for a variant that differs in more than the kind."""
    kind = kind_of(summary)
    if kind not in VARIANTS or summary.name.split()[1:] != first.name.split()[1:]:
        return ""
    share = summary.difference.detectable / first.loss.mean
    sizes = relative_differences(kind)
    return f"{sum(size >= share for size in sizes)} of {len(sizes)}"


def kind_of(summary):
    """The kind of attention that a variant's name begins with, as published.py writes it: every
    GQA, also the design gqa, counts as GQA-4."""
    words = summary.name.upper().split() or [""]
    if re.fullmatch(r"GQA(-\d+)?", words[0]):
        return "GQA-4"
    return words[0]


def published_table():
    """Published differences to MHA and their sources."""
    head = ["source", "parameters, million", "tokens, billion", "parameters equal"]
    for variant in VARIANTS:
        head.append(f"{variant} minus MHA, nats per token")
    rows = []
    for row in PUBLISHED:
        matched = "no"
        if row.matched:
            matched = "yes"
        cells = [f"[{row.paper}]({row.url}), {row.table}", f"{row.params / 1e6:,.0f}",
                 f"{row.tokens / 1e9:.0f}", matched]
        for variant in VARIANTS:
            cells.append(perplexity_cell(row, variant))
        rows.append(cells)
    return table(head, rows)


def perplexity_cell(row, variant):
    """The published difference of a variant in one table; empty where it is not there."""
    if variant not in row.perplexity:
        return ""
    return f"{row.difference(variant):+.3f} ({100 * row.relative_difference(variant):+.1f} %)"


def speed_tables(results, summaries):
    """Blocks of text: the tables of training and decoding, with their captions."""
    models, speed = by_key(summaries), results["speed"]
    return [
        training_table(results, models),
        "Decoding, ms per step, batch x context:",
        decoding_table(speed, models, decode_ms),
        "Prefill, ms, batch x context:",
        decoding_table(speed, models, prefill_ms),
        "Peak memory while decoding, MB, batch x context:",
        decoding_table(speed, models, peak_mb),
    ]


def training_table(results, models):
    """Times of whole steps: step_ms of older results is that of a micro-step."""
    tokens = results["settings"]["tokens_per_step"] / results["machine"]["ranks"]
    rows = []
    for key, summary in models.items():
        for timing in results["speed"][key]["train"]:
            rows.append([
                label_of(summary),
                f"{tokens / timing['tok_s'] * 1e3:.1f}",
                f"{timing['tok_s']:,.0f}",
                peak_mb(timing),
            ])
    return table(["variant", "training, ms per step", "tokens/s", "peak memory, MB"], rows)


def decoding_table(speed, models, cell_text):
    """A column for each batch and context; cell_text formats one timing of bench.py."""
    head = ["variant"]
    for timing in speed[next(iter(models))]["decode"]:
        head.append(f"{timing['batch_size']} x {timing['prompt_len']:,}")
    rows = []
    for key, summary in models.items():
        rows.append([label_of(summary), *map(cell_text, speed[key]["decode"])])
    return table(head, rows)


def label_of(summary):
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


# -- everything ------------------------------------------------------------------------------------

def remove_report(out_dir):
    """Removes the report and the pictures of an earlier comparison."""
    (out_dir / "report.md").unlink(missing_ok=True)
    for name in PICTURES:
        (out_dir / f"{name}.png").unlink(missing_ok=True)


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

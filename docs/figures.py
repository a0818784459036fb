"""The figures that README.md, docs/ and results/README.md quote, from the files of results/.

    python docs/figures.py         writes the tables of the documents again

A table below a comment <!-- figures: NAME --> is what TABLES[NAME] returns. SENTENCES lists the
sentences with figures; {name} stands for a value of values(). tests/test_docs.py compares both
with the documents, and finds figures that are in neither.
"""
import math
import re
import statistics

import rate_figures
import recall_figures
from reading import ROOT, read, with_both_intervals

from nanogqa.published import PUBLISHED
from nanogqa.report import published_table, table
from nanogqa.summary import summarize

DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
             "results/README.md"]
NAMES = {"MHA": "MHA", "GQA-2": "GQA, 2 heads", "MQA": "MQA", "MLA": "MLA"}  # of the variants


# -- results/compare -------------------------------------------------------------------------------

def variants(match):
    """The Summary of each variant, in the order of NAMES."""
    by_name = {}
    for summary in summarize(read("compare/results.json")):
        if summary.match == match:
            by_name[summary.name] = summary
    return [by_name[name] for name in NAMES]


def timing(key, batch_size, prompt_len, comparison="compare"):
    """The row of bench.py for decoding at that batch and context, in a folder of results/."""
    for row in read(f"{comparison}/results.json")["speed"][key]["decode"]:
        if (row["batch_size"], row["prompt_len"]) == (batch_size, prompt_len):
            return row
    raise ValueError(f"{key} was not timed at {batch_size} x {prompt_len}")


def slowest_cell(summary):
    """The timing at the largest batch and context."""
    return timing(summary.key, 16, 4096)


def attention():
    """The four variants of attention (front page)."""
    papers = {
        "MHA": ("[Vaswani et al. 2017](https://arxiv.org/abs/1706.03762)", "mha", "`n_head`",
                "a key and a value for each query head"),
        "GQA-2": ("[Ainslie et al. 2023](https://arxiv.org/abs/2305.13245)", "gqa", "2",
                  "a key and a value for each group of query heads"),
        "MQA": ("[Shazeer 2019](https://arxiv.org/abs/1911.02150)", "mqa", "1",
                "one key and one value for all query heads"),
        "MLA": ("[DeepSeek-V2, 2024](https://arxiv.org/abs/2405.04434)", "mla", "",
                "one compressed vector for all keys and values, and one shared rotary key"),
    }
    rows = []
    for summary in variants("shape"):
        paper, config, n_kv_head, cached = papers[summary.name]
        size = summary.facts["kv_bytes_per_token"]
        rows.append([f"{summary.name.removesuffix('-2')}: {paper}",
                     f"[{config}](config/{config}.py)", n_kv_head, cached, f"{size:,}"])
    return table(["attention", "config", "`n_kv_head`", "each layer caches, per token",
                  "bytes per token"], rows)


def findings():
    """Quality, memory and time of the four variants (front page)."""
    rows = []
    for summary in variants("params"):
        difference = together = ""
        if not summary.is_first:
            difference = summary.difference.text(3)
            together = f"± {summary.difference.half_together:.3f}"
        cell = slowest_cell(summary)
        rows.append([
            NAMES[summary.name],
            difference,
            together,
            f"{cell['kv_cache_bytes'] / 1e6:,.0f}",
            f"{cell['peak_memory_bytes'] / 1e6:,.0f}",
            f"{cell['step_ms']:.1f}",
            f"{cell['prefill_s']:.1f}",
        ])
    return table(["", "loss minus MHA's, nats per byte, 95 % interval", "all intervals together",
                  "cache, MB", "peak memory, MB", "decoding step, ms", "reading the prompts, s"],
                 rows)


def comparison():
    """Losses and differences in both matchings (docs/comparing.md)."""
    rows = []
    for shape, params in zip(variants("shape"), variants("params"), strict=True):
        row = [NAMES[shape.name], f"{shape.facts['kv_bytes_per_token']:,}"]
        for summary in (shape, params):
            row.append(f"{summary.loss.mean:.3f} ± {summary.loss.error:.3f}")
            row.append(with_both_intervals(summary.difference))
        rows.append(row)
    return table(["", "cache, bytes per token", "shape held equal", "difference to MHA",
                  "parameters held equal", "difference to MHA"], rows)


CELLS = [(1, 256), (1, 1024), (1, 4096), (16, 256), (16, 1024), (16, 4096)]


def over_cells(key, unit, digits):
    """A table of one quantity of decoding at every batch and context, multiplied by unit."""
    rows = []
    for summary in variants("shape"):
        row = [NAMES[summary.name]]
        for batch, tokens in CELLS:
            row.append(f"{timing(summary.key, batch, tokens)[key] * unit:,.{digits}f}")
        rows.append(row)
    return table(["", *(f"{batch} x {tokens:,}" for batch, tokens in CELLS)], rows)


def decoding_times():
    """Milliseconds of a decoding step (docs/comparing.md)."""
    return over_cells("step_ms", 1, 2)


def prefill_times():
    """Milliseconds to read the prompts (docs/comparing.md)."""
    return over_cells("prefill_s", 1e3, 0)


def peak_memory():
    """Megabytes at the peak of a decoding run (docs/comparing.md)."""
    return over_cells("peak_memory_bytes", 1e-6, 0)


NOISE_STEPS = (200, 400, 600, 800)


def losses_of(summary):
    """{step: losses of a variant at that step, one for each seed}."""
    losses = {}
    for record in read("compare/results.json")["records"]:
        if (record["variant"], record["match"]) == (summary.name, summary.match):
            for step, loss in record["curve"]:
                losses.setdefault(step, []).append(loss)
    return losses


def noise():
    """Standard deviations over seeds of MHA's loss, and of the differences to it, while they train;
    at the end also without pairs of a seed, and for the mean of the last two evaluations
    (docs/comparing.md)."""
    first = losses_of(variants("shape")[0])
    rows = [noise_row("loss of MHA", first)]
    for match, words in (("shape", "equal shape"), ("params", "equal parameters")):
        for summary in variants(match)[1:]:
            if (summary.name, match) != ("MLA", "params"):  # the same model as in equal shape
                label = f"{NAMES[summary.name]}, {words}"
                rows.append(noise_row(label, losses_of(summary), first))
    return table(["", *(f"{step} steps" for step in NOISE_STEPS), "800, unpaired",
                  "mean of 700 and 800"], rows)


def noise_row(label, losses, first=None):
    """Standard deviations of losses, or of their differences to first if it is given."""
    unpaired = ""
    if first is not None:
        variance = statistics.variance(losses[800]) + statistics.variance(first[800])
        unpaired = f"{math.sqrt(variance):.3f}"
        paired = {}
        for step, values in losses.items():
            paired[step] = [a - b for a, b in zip(values, first[step], strict=True)]
        losses = paired
    last_two = [(a + b) / 2 for a, b in zip(losses[700], losses[800], strict=True)]
    deviations = [statistics.stdev(losses[step]) for step in NOISE_STEPS]
    return [label, *(f"{x:.3f}" for x in deviations), unpaired, f"{statistics.stdev(last_two):.3f}"]


# -- results/noise.json ----------------------------------------------------------------------------

def noise_sources():
    """Standard deviations of MHA's loss where seeds set all, or one thing (docs/comparing.md)."""
    study = read("noise.json")
    both = losses_of(variants("shape")[0])[800]
    rows = []
    for name, losses in (("both: the seeds above", both),
                         ("initial weights", study["weights_vary"]),
                         ("batches", study["batches_vary"])):
        rows.append([name, f"{len(losses)}", f"{statistics.stdev(losses):.3f}"])
    return table(["what differs", "runs", "deviation of the loss"], rows)


def noise_schedules():
    """Means and standard deviations over seeds of MHA's loss, with other schedules and for a mean
    of weights (docs/comparing.md)."""
    runs = read("noise_schedule.json")["runs"]
    cosine, constant = {}, {}
    for step, losses in losses_of(variants("shape")[0]).items():
        cosine[step] = losses[:len(runs)]  # those with the same seeds
    for run in runs:
        for step, loss in run["constant"]:
            constant.setdefault(step, []).append(loss)
    cooldown, averaged = [], []
    for run in runs:
        cooldown.append(run["cooldown"])
        averaged.append(run["mean_of_weights"])
    rows = []
    for name, losses in (("cosine, seeds 1 to 6 of those above", cosine), ("constant", constant),
                         ("constant, then down to 0 in 160 steps", {800: cooldown}),
                         ("constant, mean of the weights of five evaluations", {800: averaged})):
        cells = []
        for step in NOISE_STEPS:
            cells.append(f"{statistics.stdev(losses[step]):.3f}" if step in losses else "")
        rows.append([name, f"{statistics.mean(losses[800]):.3f}", *cells])
    return table(["learning rate", "mean loss at 800 steps",
                  *(f"{step} steps" for step in NOISE_STEPS)], rows)


def of_noise():
    """The validation windows of a run, and the error that comes from them (docs/comparing.md)."""
    study = read("noise.json")
    return dict(noise_windows=str(study["windows"]), noise_error=f"{study['window_error']:.3f}")


# -- results/cache ---------------------------------------------------------------------------------

def designs():
    """Cache, loss and times of every design of config/cache.py (docs/cache.md)."""
    rows = []
    for summary in summarize(read("cache/results.json")):
        cell = timing(summary.key, 16, 4096, "cache")
        rows.append([
            f"[{summary.name}](../config/{summary.name}.py)",
            f"{cell['kv_cache_bytes'] / 1e6:,.0f}",
            f"{summary.loss.mean:.3f} ± {summary.loss.error:.3f}",
            with_both_intervals(summary.difference),
            f"{cell['step_ms']:.1f}",
            f"{cell['prefill_s']:.1f}",
        ])
    return table(["design", "cache, MB", "loss, nats per byte", "minus that of mha",
                  "decoding step, ms", "reading the prompts, s"], rows)


# -- results/*.json --------------------------------------------------------------------------------

def shakespeare():
    """Runs on tiny Shakespeare beside nanoGPT (front page and docs/training.md)."""
    rows = []
    for run in read("shakespeare.json")["runs"]:
        name = "nanoGPT's documented CPU run"
        if run["name"] != "nanoGPT":
            name = f"nanoGQA, run {run['name']}"
        bits = run["val_loss"] / math.log(2)
        rows.append([name, f"{run['params']:,}", f"{run['val_loss']:.3f}", f"{bits:.3f}",
                     f"{run['seconds']}"])
    return table(["tiny Shakespeare, width 128, context 64", "parameters",
                  "validation loss, nats per byte", "bits per byte", "seconds"], rows)


def against_nanogpt():
    """The two rows of shakespeare() that take the same losses as their aim (front page)."""
    return "\n".join(shakespeare().splitlines()[:4])


BENCHED = ("MHA", "GQA, 4 heads", "MQA", "MLA, latent 256", "MLA, latent 128")


def bench_cell(command, variant, batch_size, prompt_len):
    for row in read("bench.json")["rows"]:
        wanted = (command, variant, batch_size, prompt_len)
        if wanted == (row["command"], row["variant"], row["batch_size"], row.get("prompt_len")):
            return row
    raise ValueError(f"results/bench.json has no row {variant}, {batch_size} x {prompt_len}")


def bench_decode():
    """Decoding steps of two shapes (docs/bench.md)."""
    cells = [("12 x 768, 12 heads", "large", 1, 64), ("the same", "large", 8, 64),
             ("the same", "large", 8, 1024), ("4 x 1024, 16 heads", "cache", 16, 256),
             ("the same", "cache", 16, 1024), ("the same", "cache", 16, 4096)]
    rows = []
    for shape, command, batch_size, prompt_len in cells:
        row = [shape, f"{batch_size}", f"{prompt_len:,}"]
        for variant in BENCHED:
            cell = bench_cell(command, variant, batch_size, prompt_len)
            mbu = "" if cell["mbu"] is None else f" ({cell['mbu']:.2f})"
            row.append(f"{cell['step_ms']:.1f}{mbu}")
        rows.append(row)
    return table(["shape", "batch", "context", *BENCHED], rows)


def bench_train():
    """Training steps of a small shape (docs/bench.md)."""
    rows = [row for row in read("bench.json")["rows"] if row["command"] == "train"]
    return table(["4 x 128, 4 heads, batch 12 x 64", *(row["variant"] for row in rows)],
                 [["ms per step", *(f"{row['step_ms']:.1f}" for row in rows)]])


def transformers_train():
    """Training steps beside transformers (results/README.md)."""
    rows = []
    for row in read("transformers.json")["train"]["rows"]:
        theirs, here = row["transformers_ms"], row["here_ms"]
        name = ", ".join(filter(None, (row["model"], row["note"])))
        rows.append([name, f"{row['vocab_size']:,}", row["batch"], f"{theirs:,}", f"{here:,}",
                     f"{theirs / here:.2f}"])
    return table(["layers x width", "vocabulary", "batch x context", "transformers, ms",
                  "here, ms", "speedup"], rows)


def transformers_decode():
    """Decoding steps beside transformers (results/README.md)."""
    rows = []
    for row in read("transformers.json")["decode"]["rows"]:
        theirs, here = row["transformers_ms"], row["here_ms"]
        rows.append([f"{row['batch_size']}", f"{row['prompt_len']:,}", f"{row['n_kv_head']}",
                     f"{theirs:.1f}", f"{here:.1f}", f"{here / theirs:.2f}"])
    return table(["batch", "context", "key/value heads", "transformers, ms", "here, ms", "ratio"],
                 rows)


def slowdowns(mode, name="transformers.json"):
    """How many times as long transformers takes, in rows where both ran in one process."""
    ratios = []
    for row in read(name)[mode]["rows"]:
        if not row.get("note"):
            ratios.append(row["transformers_ms"] / row["here_ms"])
    return ratios


def against_llama_cpp():
    """How many times as long a decoding step takes here as in llama.cpp."""
    text = (ROOT / "results/against_llama_cpp.md").read_text(encoding="utf-8")
    return [float(ratio) for ratio in re.findall(r" ms \| ([\d.]+) \|$", text, re.M)]


def ablation():
    """Changes of the recipe, with three seeds each (results/README.md)."""
    changes = [("optimizer", 2, "Muon, 3e-3"), ("optimizer", 3, "Muon, 1.2e-2"),
               ("optimizer", 1, "AdamW, 1.2e-2"), ("qk_norm", 1, "no QK-norm"),
               ("tied", 1, "untied head (3.9 % more parameters)")]
    first = summarize(read("ablation/optimizer.json"))[0]
    rows = [["none: AdamW, 3e-3, QK-norm, tied head",
             f"{first.loss.mean:.3f} ± {first.loss.error:.3f}", ""]]
    for name, i, change in changes:
        summary = summarize(read(f"ablation/{name}.json"))[i]
        rows.append([change, f"{summary.loss.mean:.3f} ± {summary.loss.error:.3f}",
                     summary.difference.text(3)])
    return table(["change", "validation loss, nats per byte", "difference, 95 % interval"], rows)


def muon_overhead():
    """How much longer a step of Muon is than one of AdamW, in percent, at both learning rates."""
    times = []
    for modes in read("ablation/optimizer.json")["speed"].values():
        times.append(modes["train"][0]["step_ms"])
    adamw, other_adamw, muon, other_muon = times
    return [100 * (muon / adamw - 1), 100 * (other_muon / other_adamw - 1)]


def uptraining():
    """The table of results/uptraining.md (docs/converting.md)."""
    lines = (ROOT / "results/uptraining.md").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


# -- the first run, and one that is calculated -----------------------------------------------------

def first_run():
    """What the first command of README.md printed last, as {name: text}."""
    log = (ROOT / "results/first_run/log.txt").read_text(encoding="utf-8")
    time, loss, bits = re.search(
        r"done in (\d+ min \d+ s): val_loss ([\d.]+), val_bpb ([\d.]+)", log).groups()
    return dict(first_time=time, first_loss=loss, first_bits=bits)


def llama():
    """The cache of config/llama_8b.py in bfloat16, for a token and for 131,072 tokens."""
    text = (ROOT / "config/llama_8b.py").read_text(encoding="utf-8")
    setting = {key: int(value) for key, value in re.findall(r"^(\w+) = (\d+)$", text, re.M)}
    head_dim = setting["n_embd"] // setting["n_head"]
    size = 2 * setting["n_layer"] * setting["n_kv_head"] * head_dim * 2
    whole = size * 2**17
    return dict(
        llama_factors=f"{setting['n_layer']} x {setting['n_kv_head']} x {head_dim}",
        llama=f"{size // 1024} KiB", llama_context=f"{2**17:,}", llama_all=f"{whole / 1e9:.0f} GB",
        llama_mha=f"{whole * setting['n_head'] // setting['n_kv_head'] / 1e9:.0f} GB")


# -- tables and sentences --------------------------------------------------------------------------

TABLES = {function.__name__: function for function in (
    attention, findings, comparison, decoding_times, prefill_times, peak_memory, noise,
    noise_sources, noise_schedules, published_table, designs, shakespeare, against_nanogpt,
    bench_decode, bench_train, transformers_train, transformers_decode, ablation,
    uptraining)} | recall_figures.TABLES | rate_figures.TABLES


def values():
    """{name: text} for SENTENCES."""
    settings = read("compare/results.json")["settings"]
    download = read("download.json")["bytes"]
    sizes = [summary.facts["kv_bytes_per_token"] for summary in variants("shape")]
    return dict(
        linux=f"{download['Linux, x86-64'] / 1e9:.1f} GB",
        macos=f"{download['macOS, arm64'] / 1e9:.1f} GB",
        tokens=f"{settings['max_steps'] * settings['tokens_per_step'] / 1e6:.1f} million",
        seeds=str(settings["seeds"]),
        mha_cache=f"{sizes[0]:,}",
        **first_run(), **llama(), **ratios(), **found(), **of_mqa(), **ranges(), **of_designs(),
        **of_noise(), **timed_twice(), **recall_figures.values(), **rate_figures.of_recall_rates())


def ratios():
    """Times of each variant as a share of MHA's, for the largest batch and context."""
    cells = {summary.name: slowest_cell(summary) for summary in variants("shape")}
    shares = {}
    for name, cell in cells.items():
        key = name.lower().removesuffix("-2")
        shares[f"{key}_step"] = f"{cell['step_ms'] / cells['MHA']['step_ms']:.2f}"
        shares[f"{key}_prefill"] = f"{cell['prefill_s'] / cells['MHA']['prefill_s']:.1f}"
    return shares


def timed_twice():
    """Steps of models with equal parameters as a share of MHA's, as timed for results/compare and
    for results/cache, and the largest ratio of the two times of a model."""
    keys = {summary.name: summary.key for summary in variants("params")}
    again = {summary.name: summary.key for summary in summarize(read("cache/results.json"))}
    texts, ratios = {}, []
    for name in keys:
        key = name.lower().removesuffix("-2")
        texts[f"{key}_step_params"] = step_ratio(keys[name], keys["MHA"], "compare")
        texts[f"{key}_step_again"] = step_ratio(again[key], again["mha"], "cache")
        for tokens in (256, 1024, 4096):
            one = timing(keys[name], 16, tokens)
            other = timing(again[key], 16, tokens, "cache")
            ratios += [one["step_ms"] / other["step_ms"], one["prefill_s"] / other["prefill_s"]]
    texts["timing_spread"] = f"{max(*ratios, 1 / min(ratios)):.1f}"
    return texts


def step_ratio(key, other, comparison):
    """The time of a step as a share of another model's, at the largest batch and context."""
    step = timing(key, 16, 4096, comparison)["step_ms"]
    return f"{step / timing(other, 16, 4096, comparison)['step_ms']:.2f}"


def found():
    """True differences that the comparison with equal parameters finds with a power of 80 %."""
    texts = {}
    for summary in variants("params")[1:]:
        key = summary.name.lower().removesuffix("-2")
        texts[f"{key}_found"] = f"{summary.difference.detectable:.3f}"
    return texts


def of_mqa():
    """What the comparison finds of MQA in equal shape, beside the published run in equal shape."""
    mha, _, mqa, _ = variants("shape")
    [published] = [row for row in PUBLISHED if not row.matched]
    return dict(
        mqa_fewer=f"{100 * (1 - mqa.facts['params'] / mha.facts['params']):.0f}",
        mqa_p=f"{mqa.difference.p_holm:.3f}",
        mqa_share=f"{100 * mqa.difference.mean / mha.loss.mean:.1f}",
        mqa_published=f"{100 * published.relative_difference('MQA'):.1f}")


def of_designs():
    """Differences in loss to mha, and sizes and times as a share of its own (docs/cache.md)."""
    summaries = summarize(read("cache/results.json"))
    cells = {summary.name: timing(summary.key, 16, 4096, "cache") for summary in summaries}
    texts = {"design_seeds": str(read("cache/results.json")["settings"]["seeds"])}
    for summary in summaries[1:]:
        cell, first = cells[summary.name], cells["mha"]
        texts[f"{summary.name}_minus"] = summary.difference.text(3)
        texts[f"{summary.name}_missed"] = f"{summary.difference.detectable:.3f}"
        texts[f"{summary.name}_size"] = f"{cell['kv_cache_bytes'] / first['kv_cache_bytes']:.2f}"
        texts[f"{summary.name}_time"] = f"{cell['step_ms'] / first['step_ms']:.2f}"
    return texts


def ranges():
    """The smallest and the largest of several figures, as NAME_low and NAME_high."""
    found = []
    for match in ("shape", "params"):
        for summary in variants(match)[1:]:
            found.append(summary.difference.detectable)
    texts = {}
    for name, numbers, digits in (
            ("found", found, 3), ("muon", muon_overhead(), 0),
            ("train", slowdowns("train"), 1), ("decode", slowdowns("decode"), 1),
            ("older", [1 / slower for slower in slowdowns("train", "transformers_zen4.json")], 2),
            ("llama_cpp", against_llama_cpp(), 2)):
        texts[f"{name}_low"] = f"{min(numbers):.{digits}f}"
        texts[f"{name}_high"] = f"{max(numbers):.{digits}f}"
    return texts


SENTENCES = {
    "README.md": (
        "nothing else: {linux} on Linux, mostly PyTorch's CUDA libraries, and {macos} on macOS",
        "Here the run took {first_time} on two CPU cores",
        "{first_loss} nats are {first_bits} bits",
        "in bfloat16 this is 2 x {llama_factors} x 2 bytes, or {llama}",
        "A text of {llama_context} tokens takes {llama_all}, more than the weights",
        "32 query heads it would take {llama_mha}",
        "trained with {seeds} seeds each on {tokens} tokens",
        "a step of MQA took {mqa_step_params} of MHA's time, {mqa_step_again} in another timing",
        "true differences of {gqa_found} and {mqa_found} nats would be found four times in five",
        "After {seeds} seeds, MLA has",
        "MHA and MQA answer {fields_1_mqa} of questions about one field. With four fields, 8 "
        "key/value heads (MHA) answer {heads_mha}, 4 answer {heads_gqa4}, 2 answer {heads_gqa2}, "
        "and MQA {heads_mqa} ({heads_mqa_minus} nats); the last two, {heads_gqa2_smaller} and "
        "{heads_mqa_smaller} % smaller, are worse. Twice the steps take two other seeds from "
        "{fields_before_mha} to {fields_longer_mha} (MHA) and {fields_before_mqa} to "
        "{fields_longer_mqa} (MQA)",
        "equal parameters and {design_seeds} seeds each",
        "has a lower loss than `mha` ({window_minus} nats per byte)",
        "`tied`, whose values are the keys ({tied_minus}), and `deepseek_v4_like` "
        "({deepseek_v4_like_minus})",
        "takes {gemma_like_size} of the bytes and {gemma_like_time} of the time of a step",
        "transformers takes {decode_low} to {decode_high} times as long per decoding step",
    ),
    "docs/training.md": (
        "a step takes {muon_low} to {muon_high} % longer",
    ),
    "docs/bench.md": (
        "transformers takes {decode_low} to {decode_high} times as long per decoding step, and "
        "{train_low} to {train_high} times as long per training step in the same process",
        "here a training step takes {older_low} to {older_high} times as long as in transformers",
        "a decoding step of an exported model takes {llama_cpp_low} to {llama_cpp_high} times as "
        "long here",
    ),
    "docs/recall.md": (
        "above all six of MHA ({fields_4_minus} nats per answer)",
        "found with four fields (p {fields_4_p}), but not with two ({fields_2_p}) or one "
        "({fields_1_p})",
        "MHA answers {fields_longer_mha} and MQA {fields_longer_mqa}. With the same two seeds, the "
        "difference was {fields_before_minus} nats before and is {fields_longer_minus} now",
        "({fields_1_p}). The report of two fields, which corrects for one comparison "
        "alone, calls it found (p {fields_2_p_alone})",
        "MQA has {fields_smaller_low} to {fields_smaller_high} % fewer parameters",
        "by {rates8_minus} nats per answer with 8 records, {rates16_minus} with 16 and "
        "{rates32_minus} with 32. The test of ranks finds this with 32 records (p {rates32_p}), "
        "but not with 8 ({rates8_p}) or 16 ({rates16_p})",
        "a higher loss than MHA (adjusted p values {heads_gqa2_p} and {heads_mqa_p})",
        "GQA-4 cannot be told from MHA (p {heads_gqa4_p})",
        "Models with fewer heads are {heads_gqa4_smaller} to {heads_mqa_smaller} % smaller",
        "finds MQA's loss to be higher (p {records16_p_alone} with 16)",
        "MQA has a higher loss than MHA here too (p {partial_mqa_p}). The difference is "
        "{partial_mqa_minus} nats per answer instead of {heads_mqa_minus}; over the same seeds it "
        "changes by {rotation_changes}",
        "a lower loss than eight of width 8 (p {width_n_head4_p}), and one head of width 64 a "
        "higher one (p {width_n_head1_p}). Two heads of width 32 cannot be told from eight "
        "(p {width_n_head2_p})",
        "it is found with 32 (p {records32_p}), but not with 16 ({records16_p}) or 8 "
        "({records8_p})",
        "--match=shape --seeds={recall_seeds} --seed=1` trains on {recall_tokens} tokens",
        "MQA's loss is higher than MHA's, by {recall_mqa_minus} nats per answer",
        "a model is also {recall_gqa4_smaller} to {recall_mqa_smaller} % smaller",
        "not asked for yet is right {one_guess} of the time",
        "heads of width 8, {one_recall_tokens} tokens with {one_recall_answers} answers",
        "models with fewer of them are {one_recall_gqa4_smaller} to {one_recall_mqa_smaller} % "
        "smaller",
        "These runs saw {one_recall_answers} answers, those with three fields {recall_answers}",
        "Wide MQA has {wide_wide_mqa_as_large} times the parameters of MHA and {wide_mqa_flops} "
        "times the training FLOPs",
        "Wide MLA has {wide_wide_mla_as_large} times the parameters",
        "A step of wide MQA takes {wide_mqa_step} times as long",
    ),
    "docs/comparing.md": (
        "trains six models with {seeds} seeds each",
        "after these {tokens} tokens",
        "with {mqa_fewer} % fewer parameters, has one too, by {mqa_share} % (published in equal "
        "shape: {mqa_published} %; adjusted p value: {mqa_p})",
        "would have found {found_low} to {found_high} nats with a power of 80 %",
        "reads the same {noise_windows} windows. As an estimate for the whole text, the difference "
        "of two of these runs has a standard error of about {noise_error} nats",
        "a step takes {gqa_step} of MHA's time with GQA, {mqa_step} with MQA and {mla_step} with "
        "MLA. MLA took {mla_prefill} times as long as MHA to read these prompts",
        "GQA took {gqa_step_again} of MHA's time, MQA {mqa_step_again} and MLA {mla_step_again}, "
        "where the first timings have {gqa_step_params}, {mqa_step_params} and {mla_step_params}",
    ),
    "docs/cache.md": (
        "that of the default model, on {tokens} tokens",
        "Losses are means of {design_seeds} seeds",
        "`gemma_like` saves most: it takes {gemma_like_size} of the bytes and {gemma_like_time} of "
        "the time of a step. For it, as estimated from six seeds, a true difference of "
        "{gemma_like_missed} nats would be found four times in five",
        "train on {designs_recall_tokens} tokens with {designs_recall_answers} answers",
        "not asked for yet is right {one_guess} of the time",
        "`mla` ({mla_recall_minus} nats per answer) has fewer right answers",
        "Of {designs_recall_seeds} seeds, {mha_learned} of `mha`, `gqa` and `gemma_like` reach "
        "0.9, {share_learned} of `share` and `window`, {mqa_learned} of `mqa`, "
        "{deepseek_v4_like_learned} of `deepseek_v4_like`, {tied_learned} of `tied` and "
        "{mla_learned} of `mla`",
    ),
    "docs/variant.md": (
        "that of MHA, `KV cache {mha_cache} bytes per token in float32`",
    ),
    "results/README.md": (
        "each step takes {muon_low} to {muon_high} % longer on a CPU",
        "by up to {timing_spread} times between compare/ and cache/",
    ),
}


# -- the documents ---------------------------------------------------------------------------------

TABLE = re.compile(r"(<!-- figures: (\w+) -->\n\n)(?:\|.*\n)*\n?")


def with_tables(text):
    """A document with its tables written again."""
    def replace(match):
        return match[1] + TABLES[match[2]]() + "\n\n"
    return TABLE.sub(replace, text)


def main():
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = with_tables(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{name}: tables written")


if __name__ == "__main__":
    main()

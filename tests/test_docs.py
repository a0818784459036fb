"""The documents: links and commands name what exists, figures are those of results/, and the worked
change of docs/variant.md does what its page says."""
import ast
import collections
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from test_inputs import program
from test_repo import PROGRAMS

from nanogqa.configurator import UserError, build, choices_of, parse
from nanogqa.costs import LIBRARIES
from nanogqa.estimates import doubled_ranks, estimate_differences, two_sided_probability
from nanogqa.published import PUBLISHED
from nanogqa.report import report
from nanogqa.summary import cache_bytes

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES, "results/README.md"]
SCRIPTS = sorted(path.name for path in (ROOT / "results").glob("*.py"))
LOCAL = {"model", "train", "sample", "bench", "compare", "convert"}


def script(name):
    """The module docs/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(ROOT / "docs"))  # the scripts import each other
figures = script("figures")
recalls = figures.recall_figures
rates = figures.rate_figures


# -- links and names -------------------------------------------------------------------------------

def anchors(path):
    """The anchors that GitHub gives the headings of a document."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(words.replace(" ", "-"))
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_name_files_and_headings_that_exist(name):
    path = ROOT / name
    links = re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", path.read_text(encoding="utf-8"))
    assert links or name == "CHANGELOG.md"
    for target, anchor in links:
        linked = path
        if target:
            linked = path.parent / target
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), f"{target}#{anchor}"


def test_promises_name_tests_that_exist():
    text = (ROOT / "docs/running.md").read_text(encoding="utf-8")
    table = text.partition("\n## What a run promises\n")[2]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(lines) > 10
    for line in lines:
        named = re.findall(r"(test_\w+\.py)::(test_\w+)", line)
        assert named, line
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test


def is_local(module):
    return module.split(".")[0] in LOCAL | {"nanogqa"}


def local_names(tree):
    """(module, name) of everything that a script takes from this repository."""
    modules, names = {}, set()  # name in the script -> module
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "nanogqa":
            modules |= {alias.name: f"nanogqa.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and is_local(node.module):
            names |= {(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {alias.name: alias.name for alias in node.names if is_local(alias.name)}
    for node in ast.walk(tree):
        is_attribute = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if is_attribute and node.value.id in modules:
            names.add((modules[node.value.id], node.attr))
    return names


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_of_results_use_names_that_exist(name):
    """No test runs these scripts: they take minutes. A renamed function would go unnoticed."""
    for module, attribute in local_names(ast.parse((ROOT / "results" / name).read_text(encoding="utf-8"))):
        assert hasattr(importlib.import_module(module), attribute), f"{module}.{attribute}"


def test_contributing_names_files_that_exist():
    named = re.findall(r"`((?:\w+/)*\w+\.py)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert "nanogqa/fast.py" in named
    for target in named:
        if not target.startswith(("data/NAME", "config/NAME")):
            assert (ROOT / target).exists(), target


def test_the_map_of_files_is_complete():
    """Every program, module and folder stands in the README's map of files, and nothing else."""
    [listed] = re.findall(r"```\n(model\.py .*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    names = re.findall(r"^ *(\S+)", listed, re.M)
    files = [path.name for path in [*ROOT.glob("*.py"), *ROOT.glob("nanogqa/[a-z]*.py")]]
    folders = ["nanogqa/", "config/", "data/", "docs/", "results/", "tests/"]
    assert sorted(names) == sorted(files + folders)


# -- commands --------------------------------------------------------------------------------------

def commands(name):
    """The lines of the sh blocks of a document, split at &&, each as a list of words."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S):
        for line in block.splitlines():
            found += [shlex.split(part, comments=True) for part in line.split("&&")]
    return [words for words in found if words]


def check_command(words):
    """Reads the settings of a command of this repository as the program would. Returns its name,
    None for other commands."""
    if words[0] not in ("python", "torchrun"):
        return None
    if words[1] == "-m" or words[1].startswith("tests/"):
        return None
    at = [word.endswith(".py") for word in words].index(True)
    program, args = words[at], words[at + 1:]
    if program.startswith(("results/", "docs/")):
        assert (ROOT / program).exists(), program
        return None
    if program == "convert.py":
        program, args = f"{program} {args[0]}", args[1:]
    assert program in PROGRAMS, words
    axes = program in ("bench.py", "compare.py")
    given = parse(PROGRAMS[program], args, "", axes=axes)
    for values in choices_of(given, PROGRAMS[program]):
        build(PROGRAMS[program], values)
    return program


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_commands_name_what_exists(at_root):
    """Every command of the front page and of docs/: its program, settings and values. Those of
    docs/variant.md need its diff: see test_the_variant."""
    seen = set()
    for name in DOCUMENTS:
        if name != "docs/variant.md":
            for words in commands(name):
                seen.add(check_command(words))
    assert seen - {None} == set(PROGRAMS)


@pytest.mark.parametrize("command,error,words", [
    ("python train.py --n_kv_heads=2", UserError, "did you mean n_kv_head"),
    ("python nothing.py", AssertionError, "nothing.py"),
    ("python bench.py --n_kv_head=3,4", UserError, "n_kv_head=3 does not divide n_head"),
    ("python results/nothing.py", AssertionError, "results/nothing.py"),
    ("torchrun --standalone train.py config/none.py", UserError, "config/none.py")])
def test_a_wrong_command_is_found(command, error, words, at_root):
    with pytest.raises(error, match=words):
        check_command(command.split())


def prose(text):
    """A document without its code blocks, tables and comments."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    return "\n".join(line for line in text.splitlines() if not line.startswith("|"))


def test_the_front_page_is_short():
    words = prose((ROOT / "README.md").read_text(encoding="utf-8")).split()
    assert len(words) <= 1300


# -- figures ---------------------------------------------------------------------------------------

UNIT = ("ms|s|min|seconds|minutes|hours|nats|bits|bytes|KiB|MiB|GiB|KB|MB|GB|GFLOP/s|tokens|times|"
        "parameters|steps|%|million|billion")
FIGURE = re.compile(rf"[-+]?\d[\d.,e-]*(?: ±| to| x)*(?: [\d.,]+)*[ -](?:{UNIT})(?!\w)")

# what is not measured: settings of the commands beside them, definitions, and what tests assert
DEFINITIONS = {
    "README.md": ("16 texts of 4,096 tokens", "up to 8 billion parameters",
                  "GQA takes 2 x 4 x 2 x 32 x 4 bytes", "see only 64 tokens",
                  "At 4,096 tokens, quality was not measured"),
    "docs/training.md": ("a trace of 5 steps",),
    "docs/data.md": ("To open a data set of 20 GB, less than 100 MB are read, and batches from it take less than 300 MB of memory (tested)",),
    "docs/bench.md": ("contexts of 1,024 tokens or more",),
    "docs/comparing.md": ("a confidence of 95 % by itself", "is at most 5 %", "runs of 800 steps",
                          "found with a power of 80 %, that is", "its 95 % interval",
                          "the 10 billion tokens of its config", "16 texts of 4,096 tokens",
                          "a confidence of 95 % (Bonferroni)", "less than 0.010 nats", "wider than ± 0.010", "a deviation of 0.02 nats over seeds", "agree within 0.5 %",
                          "0.02 to 0.05 nats worse",
                          "0.6 to 2.5 times the measured one, with a confidence of 95 %",
                          "a decay of 160 steps",
                          "With 16 texts of 256 tokens, all five smaller caches took longer than MHA for a step, up to 1.2 times"),
    "docs/recall.md": ("within 200 steps", "after 200 or 250 steps", "after 150 to 250 steps", "reaches 0.9 after 250 steps with 8 records and after 300 or 400 with 16", "as many parameters (within 0.2 %)"),
    "docs/cache.md": ("chunks of at most 1,024 tokens (with torch.compile: 2,048 of all rows together)", "equal parameters (within 0.5 %)", "contexts of 256 tokens", "95 % interval",
                      "16 texts of 4,096 tokens", "more than 0.05 nats worse", "a distance of 127", "a gap of 64 tokens", "300 steps",
                      "the last `window` tokens"),
    "docs/converting.md": ("after 5 % of the steps",),
    "docs/sampling.md": ("up to 4,096 tokens in one forward pass", "chunks have 2,048 tokens of all rows together",
                         f"{LIBRARIES // 2**20} MiB for the libraries' own buffers"),
    "docs/variant.md": ("in parts of 7 tokens",),
}


def quoted(name, values):
    """The sentences of a document with their figures."""
    return [sentence.format(**values) for sentence in figures.SENTENCES.get(name, ())]


def unsupported(name, text, values):
    """Figures in the prose of a document that neither SENTENCES nor DEFINITIONS explain."""
    text = prose(text)
    for known in [*quoted(name, values), *DEFINITIONS.get(name, ())]:
        text = text.replace(known, "")
    return FIGURE.findall(text)


@pytest.fixture(scope="module")
def values():
    return figures.values()


@pytest.mark.parametrize("name", figures.DOCUMENTS)
def test_tables_are_those_of_results(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert figures.with_tables(text) == text, "run python docs/figures.py"


def test_every_table_is_used():
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in figures.DOCUMENTS)
    assert set(re.findall(r"<!-- figures: (\w+) -->", text)) == set(figures.TABLES)


@pytest.mark.parametrize("name", figures.SENTENCES)
def test_sentences_quote_results(name, values):
    text = prose((ROOT / name).read_text(encoding="utf-8"))
    for sentence in quoted(name, values):
        assert sentence in text


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_no_figure_is_without_a_source(name, values):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert unsupported(name, text, values) == []
    for known in DEFINITIONS.get(name, ()):
        assert known in text, "not in the text any more"


@pytest.mark.parametrize("words", ["takes 3.4 ms", "14.9 to 23.1 ms", "a third, 33 % more",
                                   "-0.125 nats", "0.5 GB of memory", "1.4 to 2.5 times as long"])
def test_a_figure_without_a_source_is_found(words, values):
    text = (ROOT / "README.md").read_text(encoding="utf-8") + f"\nIt {words}.\n"
    assert len(unsupported("README.md", text, values)) == 1


def verdicts(name, match):
    """{verdict: names of variants} of a comparison in results/."""
    found = {}
    for summary in figures.summarize(figures.read(f"{name}/results.json")):
        if summary.match == match and not summary.is_first:
            found.setdefault(summary.difference.verdict, set()).add(summary.name)
    return found


def test_what_the_documents_say_of_recall_by_designs():
    """README.md and docs/cache.md: three are worse, with each seed; mla answers less than a guess with every seed; mha and
    gemma_like answer with every seed, as gqa does; as many of share as of window. Student's test finds mla alone."""
    worse = {"tied", "mla", "deepseek_v4_like"}
    assert verdicts("cache_recall", "params") == {"worse": worse, "not distinguishable": {
        "gqa", "mqa", "share", "window", "gemma_like"}}
    results = figures.read("cache_recall/results.json")
    summaries = {summary.name: summary for summary in figures.summarize(results)}
    losses = {name: [record["val_loss"] for record in results["records"] if record["variant"] == name] for name in summaries}
    for name in summaries:
        assert (min(losses[name]) > max(losses["mha"])) == (name in worse)
    students = estimate_differences({name: (losses[name], losses["mha"]) for name in summaries if name != "mha"})
    assert {name for name, one in students.items() if one.found} == {"mla"}
    assert max(summaries["mla"].metrics["val_acc"]) < recalls.guess_among_the_rest()
    learned = recalls.of_designs_recall()
    assert learned["mha_learned"] == learned["gqa_learned"] == learned["gemma_like_learned"] == learned["designs_recall_seeds"]
    assert learned["share_learned"] == learned["window_learned"]
    sizes = [cache_bytes(summaries[name]) for name in ("mha", "gemma_like")]
    assert 15 < sizes[0] / sizes[1] < 16


def test_the_picture_of_the_designs(tmp_path):
    """README.md: losses and times of results/cache, right answers of results/cache_recall."""
    pytest.importorskip("matplotlib")
    joined = script("pictures")
    panels, summaries = joined.designs()
    joined.draw(panels, summaries, tmp_path / "designs.png")
    assert (tmp_path / "designs.png").stat().st_size > 10_000 and (ROOT / "docs/designs.png").exists()
    losses, answers, times = panels
    for panel, name in ((losses, "cache"), (answers, "cache_recall"), (times, "cache")):
        summaries = figures.summarize(figures.read(f"{name}/results.json"))
        assert [point.name for point in panel.points] == [summary.name for summary in summaries]
        assert [point.size for point in panel.points] == [cache_bytes(summary) for summary in summaries]
    assert (losses.lower, answers.lower, times.lower) == (True, False, None)


def test_the_designs_that_differ_are_those_that_the_documents_name():
    """README.md and docs/cache.md say which are better or worse than mha, and that the others are neither."""
    assert verdicts("cache", "params") == {
        "better": {"window"}, "worse": {"tied", "mla", "deepseek_v4_like"},
        "not distinguishable": {"gqa", "mqa", "share", "gemma_like"}}


def test_recall_is_worse_with_one_key_value_head_alone():
    """README.md and docs/recall.md. They also say that the mean of right answers falls with the heads."""
    assert verdicts("recall", "shape") == {"worse": {"MQA"}, "not distinguishable": {"GQA-4", "GQA-2"}}
    means = [recalls.of_recall("recall", "recall", 3)[f"recall_{name}"] for name in ("mha", "gqa4", "gqa2", "mqa")]
    assert means == sorted(means, reverse=True)
    results = figures.read("recall/results.json")
    five = dict(results, records=[record for record in results["records"] if record["seed"] <= 5])
    found = {summary.name: summary.difference.verdict for summary in figures.summarize(five)[1:]}
    assert found == {"GQA-4": "not distinguishable", "GQA-2": "not distinguishable", "MQA": "worse"}


def test_recall_of_one_field_is_worse_with_fewer_heads_too():
    """README.md and docs/recall.md."""
    assert verdicts("recall_one_field", "shape") == {"worse": {"GQA-2", "MQA"}, "not distinguishable": {"GQA-4"}}
    summaries = figures.summarize(figures.read("recall_one_field/results.json"))
    assert all(0.001 < summary.difference.p_holm < 0.01 for summary in summaries[2:])
    guess = recalls.guess_among_the_rest()
    assert all(statistics.mean(summary.metrics["val_acc"]) < guess for summary in summaries[2:]), "no better than a guess"


def test_a_wide_head_learns_what_a_narrow_one_does_not():
    """docs/recall.md: wide MQA learns within 200 steps, five seeds of MHA in 350 to 450; the p value of wide MLA."""
    assert verdicts("recall_wide", "shape") == {"better": {"wide_mqa"}, "worse": {"mqa"}, "not distinguishable": {"wide_mla"}}
    steps = {name: [recalls.steps_to_nine_tenths(run) for run in recalls.recall_runs("recall_wide", name)]
             for name in ("mha", "wide_mqa")}
    assert set(steps["wide_mqa"]) == {"150", "200"} and set(steps["mha"]) == {"350", "400", "450", "never"}
    summaries = {summary.name: summary for summary in figures.summarize(figures.read("recall_wide/results.json"))}
    facts = {name: summary.facts for name, summary in summaries.items()}
    mla = summaries["wide_mla"]
    assert f"{mla.difference.p_holm:.3f}" == "0.065" and mla.difference.half_together < mla.difference.mean
    assert [share > 0.9 for share in mla.metrics["val_acc"]].count(True) == 1
    losses = {}
    for record in figures.read("recall_wide/results.json")["records"]:
        losses.setdefault(record["variant"], []).append(record["val_loss"])
    assert max(losses["wide_mqa"]) < min(losses["mha"]) and sorted(losses["mha"])[4] < 0.1
    ranks = [doubled_ranks(losses[name]) for name in ("mha", "wide_mqa")]
    assert f"{statistics.correlation(*ranks):.2f}" == "-0.77"
    assert f"{summaries['wide_mqa'].difference.p_holm:.3f}" == "0.006"
    assert max(losses["mha"]) / 6 > 0.9 * (statistics.mean(losses["mha"]) - statistics.mean(losses["wide_mqa"]))
    sizes = {name: facts[name]["kv_bytes_per_token"] for name in facts}
    assert sizes["mha"] == sizes["wide_mqa"] == sizes["wide_mla"] == 8 * sizes["mqa"]


def test_where_a_smaller_cache_decodes_more_slowly():
    """docs/comparing.md: at 16 x 256, all of them do."""
    speed = figures.read("compare/results.json")["speed"]
    steps = {}
    for shape, timings in speed.items():
        [steps[shape]] = [row["step_ms"] for row in timings["decode"] if (row["batch_size"], row["prompt_len"]) == (16, 256)]
    mha = steps.pop("MHA-n_ff352")
    assert len(steps) == 5 and min(steps.values()) > mha and f"{max(steps.values()) / mha:.1f}" == "1.2"


def last_losses(folder, variant):
    """The last loss of each run of a variant."""
    records = figures.read(f"{folder}/results.json")["records"]
    return [record["val_loss"] for record in records if record["variant"] == variant]


def test_more_fields_need_more_heads():
    """README.md and docs/recall.md: which runs learn the task, the test of ranks, and the choice of the learning rate."""
    right = {}
    for fields in ("1", "2", "4"):
        for summary in figures.summarize(figures.read(f"recall_fields/{fields}/results.json")):
            right[fields, summary.name] = sorted(summary.metrics["val_acc"])
    assert min(right["1", "MHA"] + right["1", "MQA"] + right["2", "MHA"]) > 0.995 and len(right["1", "MQA"]) == 6
    assert right["2", "MQA"][4] > 0.995 and all(abs(share - 0.61) < 0.06 for share in right["2", "MQA"][:4])
    assert verdicts("recall_fields/4", "shape") == {"worse": {"MQA"}}
    assert float(recalls.of_recall_fields()["fields_4_p"]) < 0.05 < float(recalls.of_recall_fields()["fields_2_p"])
    mha, mqa = last_losses("recall_fields/4", "MHA"), last_losses("recall_fields/4", "MQA")
    fast = last_losses("recall_rates/4_mqa", "learning_rate=0.02")
    assert last_losses("recall_rates/4_mqa", "learning_rate=0.01") == mqa, "the same runs"
    assert min(mqa + fast) > max(mha) and statistics.mean(mqa) < statistics.mean(fast)
    steps = {kind: {recalls.steps_to_nine_tenths(run) for run in recalls.recall_runs("recall_fields/1", kind)} for kind in ("MHA", "MQA")}
    assert steps == {"MHA": {"150"}, "MQA": {"200", "250"}}
    program("recall")
    assert [len(sys.modules["prepare_recall"].RecallConfig(fields=fields).relations) for fields in (2, 4)] == [2, 12]


def test_fewer_heads_recall_less():
    """README.md and docs/recall.md: four fields with 8, 4, 2 and 1 key/value heads."""
    assert verdicts("recall_heads", "shape") == {"worse": {"GQA-2", "MQA"}, "not distinguishable": {"GQA-4"}}
    losses = {name: last_losses("recall_heads", name) for name in ("MHA", "GQA-4", "GQA-2", "MQA")}
    assert min(losses["GQA-2"] + losses["MQA"]) > max(losses["MHA"])
    means = [statistics.mean(values) for values in losses.values()]
    assert means == sorted(means)
    gqa4 = recalls.summarize(recalls.read("recall_heads/results.json"))[1].difference
    assert gqa4.half < gqa4.mean < gqa4.half_together
    assert {record["seed"] for record in recalls.read("recall_heads/results.json")["records"]} == set(range(11, 17))


def test_the_picture_of_the_fields(tmp_path):
    pytest.importorskip("matplotlib")
    joined = script("pictures")
    panels, summaries = joined.fields()
    joined.draw(panels, summaries, tmp_path / "fields.png", ylim=(0, 1.1))
    assert (tmp_path / "fields.png").stat().st_size > 10_000 and (ROOT / "docs/fields.png").exists()
    for panel, folder in zip(panels, ("recall_fields/1", "recall_fields/2", "recall_heads"), strict=True):
        means = {point.name: point.value for point in panel.points}
        for name, mean in means.items():
            shares = [run[-1][1] for run in recalls.recall_runs(folder, name)]
            assert mean == pytest.approx(statistics.mean(shares))


def test_the_answers_of_a_sequence():
    """docs/recall.md: counted in sequences of data/recall, and what guesses reach."""
    program("recall")
    prepare = sys.modules["prepare_recall"]
    for fields in (1, 3):
        config = prepare.RecallConfig(fields=fields, records=recalls.RECORDS, length=recalls.LENGTH, train=30, val=2)
        ids = [ids for split, ids, _ in prepare.sequences(config) if split == "train"]
        assert sum(sequence.count(prepare.ASK) for sequence in ids) / 30 == pytest.approx(recalls.mean_answers(fields))
    text = (ROOT / "docs/recall.md").read_text(encoding="utf-8")
    copied = []
    for fields in (2, 3, 4):
        share = without_finding_records(prepare, fields)
        copied.append(f"{share:.2f}")
    assert "guessing the rest is right {}, {} and {} of the time with two, three and four fields".format(*copied) in text


def test_neither_bytes_nor_width_decide_alone():
    """docs/recall.md: four models of equal cache, FLOPs and parameters."""
    assert verdicts("recall_width", "shape") == {"better": {"n_head=4"}, "not distinguishable": {"n_head=2"}, "worse": {"n_head=1"}}
    summaries = recalls.summarize(recalls.read("recall_width/results.json"))
    for key in ("kv_bytes_per_token", "flops_per_token"):
        assert len({summary.facts[key] for summary in summaries}) == 1
    sizes = [summary.facts["params"] for summary in summaries]
    assert max(sizes) < 1.002 * min(sizes)
    means = {summary.name: summary.loss.mean for summary in summaries}
    assert sorted(means, key=means.get) == ["n_head=4", "n_head=2", "n_head=8", "n_head=1"]
    four = summaries[1].difference
    assert -four.half > four.mean > -four.half_together


def test_half_rotated_heads_recall_alike():
    """docs/recall.md: MQA is worse with half of each head rotated too, and the difference does not change measurably."""
    assert verdicts("recall_partial", "shape") == {"worse": {"MQA"}}
    change = recalls.change_by_rotation()
    assert abs(change.mean) < change.half
    for folder in ("recall_partial", "recall_heads"):
        assert recalls.read(f"{folder}/results.json")["settings"]["seed"] == 11


def test_more_records_are_harder():
    """docs/recall.md: which runs learn the task with 16 and 32 records, what guesses reach, and how often all records are seen."""
    right = {}
    for records in ("16", "32"):
        for summary in recalls.summarize(recalls.read(f"recall_records/{records}/results.json")):
            right[records, summary.name] = sorted(summary.metrics["val_acc"])
    assert min(right["16", "MHA"]) > 0.99 and [share > 0.99 for share in right["16", "MQA"]].count(True) == 2
    assert right["32", "MHA"][-1] > 0.99 > 0.7 > right["32", "MHA"][-2]
    assert max(right["32", "MQA"][:5]) < 1.1 / 32 and right["32", "MQA"][5] < 0.6
    steps = {records: [recalls.steps_to_nine_tenths(run) for run in recalls.recall_runs(folder, "MHA")] for records, folder in recalls.RECORDS_OF.items()}
    found = {records: {recalls.steps_to_nine_tenths(run) for run in recalls.recall_runs(recalls.RECORDS_OF[records], "MQA")} for records in ("8", "16")}
    assert found == {"8": {"250", "never"}, "16": {"300", "400", "never"}}
    assert set(steps["8"]) == {"150", "200", "250"} and set(steps["16"]) == {"200", "250", "400"} and steps["32"].count("never") == 5
    assert float(recalls.of_recall_records()["records32_p"]) < 0.05 < float(recalls.of_recall_records()["records16_p"])
    program("recall")
    prepare = sys.modules["prepare_recall"]
    guesses = []
    for records, length in ((8, 128), (16, 128), (32, 256)):
        share = without_finding_records(prepare, 2, records, length)
        guesses.append(f"{share:.2f}")
        config = prepare.RecallConfig(fields=2, records=records, length=length, train=60, val=2)
        full = [ids for split, ids, _ in prepare.sequences(config) if split == "train" and ids.count(prepare.SEPARATOR) == records]
        assert len(full) == 60 / {8: 3, 16: 4, 32: 5}[records]
    text = (ROOT / "docs/recall.md").read_text(encoding="utf-8")
    assert "copying and guessing are right {}, {} and {} of the time with 8, 16 and 32 records".format(*guesses) in text


def without_finding_records(prepare, fields, records=recalls.RECORDS, length=recalls.LENGTH):
    """The share of right answers that finds no record: it copies the answer of an inverse question, and else guesses among the records
    not asked for yet with the same fields."""
    config = prepare.RecallConfig(fields=fields, records=records, length=length, train=2, val=1000)
    asked = right = 0
    for split, ids, _ in prepare.sequences(config):
        earlier, times = set(), collections.Counter()
        for place, token in enumerate(ids):
            if split == "val" and token == prepare.ASK:
                relation, value, answer = ids[place + 1:place + 4]
                inverse = (answer, value) in earlier
                right += 1 if inverse else 1 / (config.records - times[relation])
                asked += 1
                earlier.add((value, answer))
                times[relation] += 1
    return right / asked


def test_the_variants_that_differ_are_those_that_the_documents_name():
    """README.md and docs/comparing.md."""
    assert verdicts("compare", "params") == {"worse": {"MLA"}, "not distinguishable": {"GQA-2", "MQA"}}
    assert verdicts("compare", "shape") == {"worse": {"MLA", "MQA"}, "not distinguishable": {"GQA-2"}}
    for match in ("shape", "params"):
        gqa, mqa, mla = (summary.difference.mean for summary in figures.variants(match)[1:])
        assert abs(gqa) < 0.010 and 0.02 < mla < 0.05, "as expected"
        assert (abs(mqa) < 0.010) == (match == "params")
    results = figures.read("compare/results.json")
    widths = {}
    for seeds in (4, 6, 10, 18, 22, 23):
        records = [record for record in results["records"] if record["seed"] <= seeds]
        found = [summary for summary in figures.summarize(dict(results, records=records)) if summary.difference]
        widths[seeds] = sorted(summary.difference.half for summary in found if (summary.match, summary.name) != ("params", "MLA"))
        [mqa] = [summary.difference for summary in found if (summary.match, summary.name) == ("shape", "MQA")]
        [mla] = [summary.difference for summary in found if (summary.match, summary.name) == ("shape", "MLA")]
        assert (mqa.found, mla.found) == (seeds >= 18, seeds >= 6)
        assert seeds != 18 or f"{mqa.p_holm:.3f}" == "0.049"
    assert [sum(width > 0.010 for width in widths[seeds]) for seeds in (18, 22, 23)] == [3, 1, 0]


def test_what_the_documents_say_of_the_noise():
    """docs/comparing.md: it falls while models train, pairs help GQA in equal shape most, a mean of two evaluations does not."""
    rows = [line.split("|")[1:-1] for line in figures.noise().splitlines()[2:]]
    paired = {}
    for name, *cells in rows:
        at_200, _, _, at_800, unpaired, last_two = (float(cell) if cell.strip() else None for cell in cells)
        assert at_800 < 0.75 * at_200 and abs(last_two - at_800) < 0.0015
        if unpaired:
            paired[name.strip()] = at_800 / unpaired
    best = paired.pop("GQA, 2 heads, equal shape")
    sixth = paired.pop("MQA, equal parameters")
    assert 0.77 < best < 0.82 and 0.81 < sixth < 0.86 < min(paired.values()) and len(paired) == 3
    found = []
    for match in ("shape", "params"):
        mha, *others = [figures.losses_of(variant)[800] for variant in figures.variants(match)]
        found += [correlation_p(mha, losses) for losses in others]
    r, p = max(found)
    assert (f"{r:.2f}", f"{p:.2f}") == ("0.36", "0.09") and all(p > 0.05 for _, p in found)


def test_what_the_documents_say_of_the_schedule():
    """docs/comparing.md: a decay and a mean of weights leave about half the noise of a constant rate, and lower losses than the cosine."""
    runs = figures.read("noise_schedule.json")["runs"]
    constant = {step: [dict(map(tuple, run["constant"]))[step] for run in runs] for step in (200, 400, 600, 800)}
    deviations = [statistics.stdev(constant[step]) for step in (200, 400, 600, 800)]
    assert deviations != sorted(deviations, reverse=True), "it does not fall steadily"
    cosine = figures.losses_of(figures.variants("shape")[0])[800][:len(runs)]
    ratios = []
    for name in ("cooldown", "mean_of_weights"):
        losses = [run[name] for run in runs]
        ratios.append(f"{deviations[-1] / statistics.stdev(losses):.1f}")
        assert 0.4 < statistics.stdev(losses) / deviations[-1] < 0.6 and statistics.stdev(losses) < statistics.stdev(cosine) + 0.0005
        assert all(loss < other for loss, other in zip(losses, cosine, strict=True))
    assert len(runs) == 6 and ratios == ["2.1", "1.8"]
    last = list(constant[800])
    p_values = [pitman_morgan(last, [run[name] for run in runs]) for name in ("cooldown", "mean_of_weights")]
    assert [f"{p:.2f}" for p in p_values] == ["0.08", "0.12"]


def correlation_p(x, y):
    """(r, p) of Pearson's correlation: t = r sqrt((n - 2) / (1 - r^2)) has Student's distribution with n - 2 degrees of freedom."""
    r = statistics.correlation(x, y)
    df = len(x) - 2
    return r, 1 - two_sided_probability(abs(r) * (df / (1 - r * r)) ** 0.5, df)


def pitman_morgan(x, y):
    """The p value for equal deviations of paired values: whether their sums and differences are correlated."""
    return correlation_p([a + b for a, b in zip(x, y, strict=True)], [a - b for a, b in zip(x, y, strict=True)])[1]


def test_what_the_documents_say_of_its_sources():
    """docs/comparing.md: 6 runs do not say whether weights or batches matter more."""
    study = figures.read("noise.json")
    assert len(study["weights_vary"]) == len(study["batches_vary"]) == 6
    assert study["weights_vary"][0] == study["batches_vary"][0], "the same run"
    weights, batches = (statistics.stdev(study[name]) for name in ("weights_vary", "batches_vary"))
    assert 1 / 2.67 < weights / batches < 2.67, "the 95 % interval for a ratio of 1: F with 5 and 5 degrees of freedom"
    quantiles = (12.833, 0.8312)  # of chi-square with 5 degrees of freedom, at 0.975 and 0.025
    assert [f"{(5 / quantile) ** 0.5:.1f}" for quantile in quantiles] == ["0.6", "2.5"]


def test_what_the_documents_say_of_larger_and_slower(values):
    """README.md and docs/comparing.md: published differences of GQA and MQA with equal parameters are smaller, in % of the loss;
    MLA reads slower."""
    params = {summary.name: summary for summary in figures.variants("params")}
    for name, published in (("GQA-2", "GQA-4"), ("MQA", "MQA")):
        found = params[name].difference.detectable / params["MHA"].loss.mean
        sizes = [abs(row.relative_difference(published)) for row in PUBLISHED if row.matched and published in row.perplexity]
        assert len(sizes) >= 3 and max(sizes) < found
    cells = {name: figures.slowest_cell(summary) for name, summary in params.items()}
    for key in ("step_ms", "peak_memory_bytes"):
        assert max(cells["GQA-2"][key], cells["MQA"][key]) < cells["MHA"][key]
    assert cells["MLA"]["prefill_s"] > cells["MHA"]["prefill_s"]
    for prompt_len in (256, 1024, 4096):
        for batch_size in (1, 16):
            shape = {summary.name: figures.timing(summary.key, batch_size, prompt_len)
                     for summary in figures.variants("shape")}
            assert shape["MLA"]["prefill_s"] > shape["MHA"]["prefill_s"]
            if batch_size == 1:
                assert shape["MLA"]["peak_memory_bytes"] > shape["MHA"]["peak_memory_bytes"]
            gqa, mha = (figures.timing(params[name].key, batch_size, prompt_len) for name in ("GQA-2", "MHA"))
            assert gqa["prefill_s"] > mha["prefill_s"]
            assert batch_size > 1 or gqa["step_ms"] > mha["step_ms"]


def test_a_changed_figure_is_found(values):
    """One digit changed, in a table and in a sentence."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert figures.with_tables(text.replace("| 2,048 |", "| 2,049 |")) == text
    changed = text.replace(values["macos"], "9.9 GB")
    assert not all(sentence in changed for sentence in quoted("README.md", values))


def test_the_log_and_the_text_of_the_front_page_were_printed():
    """The excerpts are lines of results/first_run, which the commands beside them wrote."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    log = (ROOT / "results/first_run/log.txt").read_text(encoding="utf-8").splitlines()
    [excerpt] = re.findall(r"```\n(model: .*?)```", text, re.S)
    for line in excerpt.splitlines():
        assert line == "..." or line in log
    [sampled] = re.findall(r"```python\n(.*?)```", text, re.S)
    assert sampled in (ROOT / "results/first_run/sample.txt").read_text(encoding="utf-8")


def test_learning_rates_of_recall():
    """docs/recall.md: the best rate of each row, what six seeds say of it, and few wide heads."""
    best = {}
    for _, _, folder in rates.POINTS:
        for name, summaries in rates.by_rate(folder).items():
            best[folder.removeprefix("recall_rates/"), name] = rates.best_rate(summaries)
    assert [best[folder, "MHA"] for folder in ("2", "2n16", "2n32", "4")] == ["0.01", "0.02", "0.01", "0.01"]
    assert [best[folder, "MQA"] for folder in ("2", "2n16", "2n32", "4")] == ["0.02"] * 4
    assert best["width", "n_head=8"] == best["width", "n_head=4"] == "0.01"
    one = {name: rates.by_rate("recall_rates/1")[name] for name in ("MHA", "MQA")}
    for rate in ("0.005", "0.01", "0.02"):
        assert min(one["MHA"][rate].metrics["val_acc"] + one["MQA"][rate].metrics["val_acc"]) > 0.995
        mha, mqa = (recalls.recall_runs("recall_rates/1", f"{name} learning_rate={rate}") for name in one)
        steps = [sum(int(recalls.steps_to_nine_tenths(run)) for run in runs) for runs in (mha, mqa)]
        assert len(mha) == len(mqa) == 2 and steps[0] < steps[1]
    for rate in ("0.005", "0.01", "0.02"):
        losses = {name: summaries[rate].loss.mean for name, summaries in rates.by_rate("recall_rates/width").items()}
        assert losses["n_head=4"] < losses["n_head=8"]
    both = rates.by_rate("recall_rates/2n32")
    assert all(max(summary.metrics["val_acc"]) < 0.05 for summary in both["MQA"].values()) and len(both["MQA"]) == 4
    learned = {rate for rate, summary in both["MHA"].items() if min(summary.metrics["val_acc"]) > 0.995}
    assert learned == {"0.005", "0.01"}
    assert min(rates.by_rate("recall_rates/2")["MQA"]["0.02"].metrics["val_acc"]) > 0.995
    learned, means = {}, {}
    for fields, records, name, rate, folder, variant in rates.SIX:
        runs = recalls.recall_runs(folder, variant)
        assert len(runs) == 6
        learned[fields, records, name, rate] = sum(points[-1][1] > 0.99 for points in runs)
        means.setdefault((fields, records, name), {})[rate] = statistics.mean(last_losses(folder, variant))
    assert learned["2", "8", "MQA", "0.02"] == learned["2", "8", "MQA", "0.01"] == 2
    assert (learned["2", "16", "MHA", "0.02"], learned["2", "16", "MHA", "0.01"]) == (4, 6)
    two = [found for found in means.values() if len(found) == 2]
    assert len(two) == 5 and all(found["0.01"] < found["0.02"] for found in two)


# -- the picture at the top ------------------------------------------------------------------------

def test_the_picture_is_drawn_from_results():
    head = script("head")
    results = json.loads(head.RESULTS.read_text(encoding="utf-8"))
    assert head.PICTURE.read_text(encoding="utf-8") == head.picture(results), "run python docs/head.py"
    results["speed"]["MQA-n_ff352"]["decode"][-1]["step_ms"] += 1
    assert head.PICTURE.read_text(encoding="utf-8") != head.picture(results)


FIELDS = [f"recall_fields/{name}" for name in ("1", "2", "4", "longer")]
RATES = [f"recall_rates/{name}" for name in ("1", "2", "2n16", "2n32", "4", "width", "2n16_fast", "2_mqa", "2n32_mqa", "4_mqa")]


@pytest.mark.parametrize("name", ["compare", "cache", "recall", "recall_one_field", "recall_wide", "cache_recall", "recall_heads", "recall_records/16", "recall_records/32", "recall_partial", "recall_width", *FIELDS, *RATES])
def test_reports_are_those_of_their_results(name):
    folder = ROOT / "results" / name
    parts = ["curves", "quality", "decode"]
    if "recall" in name:
        parts.append("metrics")
    if not name.endswith(("width", "_mqa")):  # whose variants have one cache
        parts.append("front")
    pictures = [folder / f"{part}.png" for part in parts]
    text = report(figures.read(f"{name}/results.json"), pictures)
    written = (folder / "report.md").read_text(encoding="utf-8")
    assert text == written, f"python compare.py --report_only=True --out_dir=results/{name}"
    for picture in pictures:
        assert picture.exists()


def test_a_step_takes_less_time_if_it_reads_less():
    """docs/cache.md: of the designs with key/value heads, in a model with a large cache."""
    lines = (ROOT / "results/cache_decode.md").read_text(encoding="utf-8").splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    read = {name: (float(size.replace(",", "")), float(ms)) for name, _, size, ms, _ in cells}
    assert len(read) == 9 and read.pop("mla")
    in_order = sorted(read.values())
    assert in_order == sorted(read.values(), key=lambda pair: pair[1]) and in_order[-1][1] > 5 * in_order[0][1]


# -- docs/variant.md -------------------------------------------------------------------------------

# runs in a copy of the repository with the diff applied; the arguments are those of toy_run
VARIANT = r"""
import contextlib
import io
import re
import sys

import pytest
import torch

import compare
import convert
import sample
import test_docs
import train
from compare import CompareConfig
from conftest import load_model, toy_config, toy_ids, toy_model
from model import GPT, Context, rope_cos_sin, rope_frequencies
from nanogqa.cache import KVCache
from nanogqa.configurator import UserError, parse

out_dir = [arg for arg in sys.argv[1:] if arg.startswith("--out_dir=")][0].split("=")[1]
page = open("docs/variant.md").read()

# the commands of the page
seen = {test_docs.check_command(words) for words in test_docs.commands("docs/variant.md")}
assert seen == {None, "train.py", "sample.py", "bench.py", "compare.py"}

# the program on the page
[program] = re.findall(r"```python\n(.*?)```", page, re.S)
with contextlib.redirect_stdout(io.StringIO()) as printed:
    exec(program)
[difference] = re.findall(r": (\S+)", printed.getvalue())
assert float(difference) < 1e-4

# cached = full for larger weights, GQA and MQA, in one pass, in parts and token by token; static
# and ragged caches are those of the other variants
for n_kv_head in (4, 2, 1):
    model, idx = toy_model(attn_gate=True, n_kv_head=n_kv_head), toy_ids()
    assert "layers.1.attn.gate_proj.weight" in model.state_dict()
    with torch.inference_mode():
        full = model(idx)[0]
        for size in (48, 7, 1):
            cache = KVCache(model.config, 2, 48)
            parts = [model(part, cache=cache)[0] for part in idx.split(size, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-4, rtol=1e-4)
        plain = KVCache(toy_config(n_kv_head=n_kv_head), 2, 48)
        assert cache.nbytes == plain.nbytes

# the formula of the page: what o_proj gets is that of the same layer without the gate, times it
config = toy_config(attn_gate=True, n_kv_head=2)
layer = GPT(config).layers[0].attn
x = torch.randn(1, 9, 32)
context = Context(*rope_cos_sin(torch.arange(9)[None], rope_frequencies(config)), {None: None}, None)
with torch.inference_mode():
    layer.o_proj = torch.nn.Identity()
    y = layer(x, context, None)[0]
    gate, layer.gate_proj = layer.gate_proj, None
    read = layer(x, context, None)[0]
    torch.testing.assert_close(y, read / (1 + torch.exp(-gate(x))), atol=1e-5, rtol=1e-5)

# a setting that is off changes nothing
for name, weight in GPT(toy_config()).state_dict().items():
    assert torch.equal(weight, GPT(toy_config(attn_gate=False)).state_dict()[name])
with pytest.raises(ValueError, match="attn_gate=True is for attention=gqa"):
    toy_config(attention="mla", attn_gate=True)

# it trains, samples, and convert.py refuses it by name
train.main([*sys.argv[1:], "--max_steps=4", "--attn_gate=True"])
assert load_model(out_dir).config.attn_gate
texts = []
for kv_cache in (True, False):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        sample.main([f"--out_dir={out_dir}", "--prompt=the ", "--temperature=0", "--device=cpu",
                     "--max_new_tokens=20", f"--kv_cache={kv_cache}"])
    texts.append(printed.getvalue())
assert texts[0] == texts[1]
with pytest.raises(UserError, match="attn_gate=True cannot be exported"):
    convert.model_type_of(load_model(out_dir).config)

# the plan of the comparison on the page, at toy size
[words] = [words for words in test_docs.commands("docs/variant.md") if "compare.py" in words]
toy = [arg for arg in sys.argv[1:] if not arg.startswith("--n_kv_head")]
given = parse(CompareConfig, [*toy, *words[2:]], "", axes=True)
variants = compare.plan(given)[2]
assert [variant.name for variant in variants] == ["attn_gate=False", "attn_gate=True"] * 2
plain, gated, _, matched = [variant.facts for variant in variants]
assert gated["kv_bytes_per_token"] == plain["kv_bytes_per_token"]
assert gated["params"] > 1.02 * plain["params"] and matched["params"] < 1.01 * plain["params"]
"""
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "out", "hf", "wandb", "*.bin", "*.part",
                                  "__pycache__", ".pytest_cache", "*.egg-info")


def test_the_variant(toy_run, tmp_path):
    """docs/attn_gate.diff applies to this tree, and what docs/variant.md says of it holds."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    inside = dict(os.environ, GIT_CEILING_DIRECTORIES=os.path.realpath(tmp_path))  # git may know a folder above it
    subprocess.run(["git", "apply", "docs/attn_gate.diff"], cwd=copy, check=True, env=inside)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = ['.', 'tests']\n{VARIANT}", *toy_run],
        cwd=copy, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_the_variant_is_as_long_as_its_page_says():
    changed = re.findall(r"^[-+](?![-+])", (ROOT / "docs/attn_gate.diff").read_text(encoding="utf-8"), re.M)
    assert len(changed) <= 22

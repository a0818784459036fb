"""results.json of a comparison: what it holds, and how it is read back."""
import json
import re
from dataclasses import fields

from nanogqa import schema
from nanogqa.configurator import UserError, convert, one_line

# -- what it holds ---------------------------------------------------------------------------------

def key_of(name, n_ff):
    """The name of a variant's model: the key of its timings, and the first part of its runs' names.
    """
    return f"{re.sub(r'[^A-Za-z0-9.=-]+', '_', name)}-n_ff{n_ff}"


def quantity(value):
    """A number below 1e15 in size, so that sums of squares stay finite."""
    return schema.number(value) and abs(value) < 1e15


def bits(value):
    """A number below 1e15 in size, or None where the loss counts answers alone."""
    return value is None or quantity(value)


def duration(value):
    """A number above 0 and below 1e15."""
    return quantity(value) and value > 0


def share(value):
    """A number above 0 and below 1e15, or None where it is unknown."""
    return value is None or duration(value)


def matching(value):
    """A matching: shape or params."""
    return value in ("shape", "params")


def point(value):
    """A point of a curve: [step, loss]."""
    return (isinstance(value, list) and len(value) == 2 and schema.count(value[0])
            and quantity(value[1]))


positive = schema.positive_count
# what the report and a resumed comparison read from results.json; older ones have no metrics
SETTINGS = {"dataset": str, "seed": schema.count, "seeds": positive, "max_steps": positive,
            "tokens_per_step": positive, "warmup_steps": schema.count}
MACHINE = {"cpu": str, "gpu": (str, type(None)), "threads": schema.count, "torch": str,
           "dtype": str, "ranks": positive, "cache_bytes?": (int, type(None))}
TRAINING = {"step_ms": duration, "tok_s": duration, "peak_memory_bytes": quantity}
DECODING = {"batch_size": positive, "prompt_len": positive, "step_ms": duration,
            "prefill_s": duration, "mbu": share, "bytes_per_step": positive,
            "kv_cache_bytes": positive, "peak_memory_bytes": quantity}
RECORD = {
    "variant": str, "match": matching, "seed": schema.count, "run": str,
    "shape": str,  # the key of its model
    "heads?": str, "n_ff": positive, "params": positive, "non_embedding_params": positive,
    "flops_per_token": positive, "kv_bytes_per_token": positive, "kv_bytes_of_context?": positive,
    "val_loss": quantity, "val_bpb": bits, "metrics?": {str: quantity}, "curve": [point],
}
RESULTS = {
    "settings": SETTINGS, "dataset_sha256": str, "tokenizer": str, "machine": MACHINE, "date": str,
    "variants": [{"name": str, "match": matching, "n_ff": positive}], "code?": str,
    "speed": {str: {"train": [TRAINING], "decode": [DECODING]}}, "records": [RECORD],
}


def evaluations(rows):
    """Those of the rows of metrics.jsonl that have a validation loss."""
    evaluated = []
    for row in rows:
        if row.get("val_loss") is not None:
            evaluated.append(row)
    return evaluated


def curve_of(rows):
    """[[step, val_loss], ...] of the evaluations among rows of metrics.jsonl."""
    curve = []
    for row in evaluations(rows):
        curve.append([row["step"], row["val_loss"]])
    return curve


def metrics_of(row):
    """Every number of a row whose name starts with val_."""
    metrics = {}
    for key, value in row.items():
        if key.startswith("val_") and isinstance(value, int | float):
            metrics[key] = value
    return metrics


def recorded_runs(results):
    """{name of the run: its record} of the records in results."""
    return {record["run"]: record for record in results["records"]}


def is_recorded(rows, record):
    """Whether a record was made from these rows of metrics.jsonl. Older ones have no metrics."""
    if curve_of(rows) != record["curve"]:
        return False
    metrics = metrics_of(evaluations(rows)[-1])
    return metrics == record.get("metrics", metrics)


# -- reading it ------------------------------------------------------------------------------------

def load_results(path, cls):
    """The content of a results.json; cls are the settings of compare.py.

    Raises UserError where it is something else.
    """
    try:
        results = schema.read_json(path, RESULTS)
        check_settings(results["settings"], cls)
        check_speed(results)
        check_records(results)
        # a path may hold bytes that are not text, but nothing else does
        json.dumps(results, ensure_ascii=False).encode("utf-8", "surrogateescape")
        return results
    except (ValueError, RecursionError, UserError) as error:
        raise UserError(f"{path} is not a results file of compare.py ({one_line(error, 120)}): "
                        "move it away, or choose another --out_dir") from None


def check_settings(settings, cls):
    """Raises UserError if a setting has a value that nobody could have given."""
    known = {field.name for field in fields(cls)}
    for key, value in settings.items():
        if key not in known:
            continue  # of another version
        values = [value]
        if key in ("decode_batch_size", "decode_prompt_len") and isinstance(value, list):
            values = value
        for part in values:
            convert(cls, key, part, "settings")


def check_speed(results):
    """Raises ValueError unless no model is timed yet, or each, with the same batches and contexts.
    """
    speed = results["speed"]
    models = {key_of(variant["name"], variant["n_ff"]) for variant in results["variants"]}
    if not models or (speed and models != speed.keys()):
        raise ValueError("speed and variants hold different models")
    grids = set()
    for rows in speed.values():
        grids.add(tuple((row["batch_size"], row["prompt_len"]) for row in rows["decode"]))
        if not rows["train"] or not rows["decode"]:
            raise ValueError("a model has no timing")
    if len(grids) > 1:
        raise ValueError("models are timed at different batches")


def check_records(results):
    """Raises ValueError unless there is no record yet, or one for each variant and seed."""
    records = results["records"]
    if not records:
        return
    keys = []
    steps = []
    for record in records:
        keys.append((record["match"], record["variant"], record["n_ff"], record["seed"]))
        steps.append([step for step, _ in record["curve"]])
        if not record["curve"] or record["curve"][-1][1] != record["val_loss"]:
            raise ValueError("a curve does not end with the loss of its run")
        if record["shape"] != key_of(record["variant"], record["n_ff"]):
            raise ValueError("a record has the key of another model")
    if steps[0] != sorted(set(steps[0])) or steps.count(steps[0]) < len(steps):
        raise ValueError("curves have different steps")
    if len({record["val_bpb"] is None for record in records}) > 1:
        raise ValueError("some runs have bits per byte and others have none")
    settings = results["settings"]
    if len(records) != len(results["variants"]) * settings["seeds"]:
        raise ValueError("there is not one record for each variant and seed")
    wanted = []
    for variant in results["variants"]:
        for seed in range(settings["seed"], settings["seed"] + settings["seeds"]):
            wanted.append((variant["match"], variant["name"], variant["n_ff"], seed))
    if keys != wanted:
        raise ValueError("records and variants hold different models or seeds")

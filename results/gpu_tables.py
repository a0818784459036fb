"""The tables of gpu.md, made of the rows of gpu.json."""


def has_failed(outcome):
    checks = outcome.get("checks", [])
    return "error" in outcome or not all(check["passed"] for check in checks)


def tables(measured):
    """The text of gpu.md: a section for each device and version, the newest first."""
    lines = ["# Measured on a GPU", "", "`python results/gpu.py` writes this page."]
    places = {}  # (device, tree) -> its rows
    for row in measured:
        places.setdefault((row["device"], row["tree"]), []).append(row)
    for (device, tree), rows in reversed(places.items()):
        lines += ["", f"## {device}", "", f"Programs {tree}."]
        titles = {}  # title of a table -> its rows
        for row in rows:
            titles.setdefault(title_of(row), []).append(row)
        for title, titled in titles.items():
            lines += ["", f"### {title}", "", *table(titled)]
    return "\n".join(lines) + "\n"


def title_of(row):
    if "width" in row["settings"]:
        return "attention of a decoding step, in milliseconds"
    return row["part"]


def table(rows):
    """The lines of a table, with a line for each row."""
    columns = ["result", "figure, limit", "note"]
    if rows[0]["part"] != "check":
        columns = columns_of(rows)
    lines = [line_of(["", *columns]), "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        found = cells(row, ratios(row, rows), columns)
        lines.append(line_of([row["name"], *found]))
    return lines


def columns_of(rows):
    """The entries of COLUMNS that a row has."""
    seen = set()
    for row in rows:
        seen |= row["outcome"].keys() | ratios(row, rows).keys()
    return [key for key in COLUMNS if key in seen]


def ratios(row, rows):
    """A row's step and bytes over those of the row that it is compared with, where both are."""
    for other in rows:
        if other["name"] == row["beside"] and other is not row:
            found = {"beside": other["name"]}
            for name, key in (("step ratio", "step_ms"), ("bytes ratio", "bytes_per_step")):
                if row["outcome"].get(key) and other["outcome"].get(key):
                    found[name] = row["outcome"][key] / other["outcome"][key]
            return found
    return {}


def line_of(cells):
    return f"| {' | '.join(cells)} |"


# results that the tables show, and how
COLUMNS = {
    "error": "", "batch_size": ",", "prompt_len": ",", "rows": ",", "tokens": ",", "steps": ",",
    "seconds": ",.0f", "val_loss": ".3f", "step_ms": ",.3f", "decode_tok_s": ",.0f",
    "tok_s": ",.0f", "mbu": ".2f", "mfu": ".2f", "bytes_per_step": ",",
    "peak_memory_bytes": ",", "beside": "", "step ratio": ".2f", "bytes ratio": ".2f",
    "transformers": "", "parameters": ",", "losses": "",
    **{f"{name}{case}": ".3f" for name in ("cuDNN", "flash", "efficient")
       for case in ("", ", mask", ", new length")},
}


def cells(row, ratios, columns):
    """The cells of a row, as text."""
    outcome = {**row["outcome"], **ratios}
    if row["part"] == "check":
        return check_cells(outcome)
    texts = []
    for column in columns:
        value = outcome.get(column)
        text = ""
        if value is not None:
            text = f"{value:{COLUMNS[column]}}"
        if column in row["target"] and text:
            text += f" (target {row['target'][column]:,})"
        texts.append(text)
    return texts


def check_cells(outcome):
    """Result, the figure nearest to its limit or those beyond it, and the note."""
    if "error" in outcome:
        return ["failed", outcome["error"], ""]
    shown = [check for check in outcome["checks"] if not check["passed"]]
    verdict = "fail"
    if not shown:
        verdict = "pass"
        shown = [max(outcome["checks"], key=nearness)]
    texts = []
    for check in shown:
        figure = "not finite"
        if check["figure"] is not None:
            figure = f"{check['figure']:.3g}"
        texts.append(f"{check['what']}: {figure} (at most {check['limit']:g})")
    return [verdict, "; ".join(texts), outcome.get("note", "")]


def nearness(check):
    """Larger for figures nearer to their limit."""
    if check["limit"] > 0:
        return check["figure"] / check["limit"]
    return check["figure"] - check["limit"]

"""Draws docs/head.svg, the picture at the top of README.md.

    python docs/head.py

Left: which key/value heads each query head reads, and the bytes that a token leaves in the cache.
Right: the time of a decoding step over the context. Both are read from results/compare.
"""
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results/compare/results.json"
PICTURE = ROOT / "docs/head.svg"

WIDTH, HEIGHT = 1000, 400
BATCH = 16  # of the decoding times

# variant in results.json -> name in the picture, number of key/value heads (0: a latent)
VARIANTS = {"MHA": ("MHA", 4), "GQA-2": ("GQA", 2), "MQA": ("MQA", 1), "MLA": ("MLA", 0)}
QUERY_HEADS = 4

STYLE = """
  text { font-family: Helvetica, Arial, sans-serif; font-size: 19px; fill: #1f2328 }
  .title { font-size: 20px; font-weight: bold }
  .name { font-size: 22px; font-weight: bold }
  .middle { text-anchor: middle }
  .end { text-anchor: end }
  .page { fill: #ffffff; stroke: #d1d9e0 }
  .query { fill: #59636e }
  .axis { stroke: #59636e; stroke-width: 1.5; fill: none }
  .grid { stroke: #d1d9e0; stroke-width: 1 }
  .wire { stroke-width: 2.5; fill: none }
  .line { stroke-width: 3.5; fill: none }
  .MHA { --color: #0969da } .GQA { --color: #1a7f37 }
  .MQA { --color: #bc4c00 } .MLA { --color: #8250df }
  .fill { fill: var(--color) } .stroke { stroke: var(--color) }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc }
    .page { fill: #0d1117; stroke: #3d444d }
    .query { fill: #9198a1 }
    .axis { stroke: #9198a1 }
    .grid { stroke: #3d444d }
    .MHA { --color: #4493f8 } .GQA { --color: #3fb950 }
    .MQA { --color: #f0883e } .MLA { --color: #bc8cff }
  }
"""


# -- elements --------------------------------------------------------------------------------------

def text(x, y, words, classes=""):
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{classes}">{words}</text>'


def line(start, end, classes):
    (x1, y1), (x2, y2) = start, end
    return f'<path d="M{x1:.1f} {y1:.1f} L{x2:.1f} {y2:.1f}" class="{classes}"/>'


def dot(x, y, radius, classes):
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{classes}"/>'


def box(x, y, width, classes):
    """A rounded box of that width, with its top in the middle at (x, y)."""
    return (f'<rect x="{x - width / 2:.1f}" y="{y:.1f}" width="{width}" height="22" rx="5" '
            f'class="{classes}"/>')


# -- left: heads -----------------------------------------------------------------------------------

TOP, BOTTOM = 120, 220  # of the query heads' centers and of the key/value heads
SPACING = 25            # between query heads


def heads(name, n_kv_head, center, bytes_per_token):
    """The wiring of one variant around x = center."""
    queries = [center + (i - 1.5) * SPACING for i in range(QUERY_HEADS)]
    shared = max(1, n_kv_head)
    per_head = QUERY_HEADS // shared
    drawn = [text(center, 88, name, f"name middle fill {name}")]
    targets = []
    for k in range(shared):
        group = queries[k * per_head:(k + 1) * per_head]
        x = sum(group) / len(group)
        targets.append(x)
        for query in group:
            drawn.append(line((query, TOP), (x, BOTTOM), f"wire stroke {name}"))
    for query in queries:
        drawn.append(dot(query, TOP, 9, "query"))
    for x in targets:
        width = 20
        if n_kv_head == 0:
            width = 70
        drawn.append(box(x, BOTTOM, width, f"fill {name}"))
    drawn.append(text(center, BOTTOM + 60, f"{bytes_per_token:,}", "middle name"))
    drawn.append(text(center, BOTTOM + 84, "bytes/token", "middle"))
    return drawn


def left(results):
    """All variants side by side."""
    drawn = [text(24, 40, "Query heads share key/value heads", "title")]
    for i, (variant, (name, n_kv_head)) in enumerate(VARIANTS.items()):
        record = first(results["records"], variant=variant)
        drawn += heads(name, n_kv_head, 84 + 122 * i, record["kv_bytes_per_token"])
    drawn.append(dot(33, 353, 9, "query"))
    drawn.append(text(48, 360, "query head"))
    drawn.append('<rect x="170" y="342" width="20" height="22" rx="5" class="query"/>')
    drawn.append(text(198, 360, "cached: key/value head or latent"))
    return drawn


# -- right: decoding -------------------------------------------------------------------------------

X0, X1, Y0, Y1 = 590, 900, 322, 70  # the corners of the chart: left, right, bottom, top
LONGEST, SLOWEST = 4096, 40         # at the right and at the top


def place(context, ms):
    """The point of a context and a time in the chart."""
    return X0 + (X1 - X0) * context / LONGEST, Y0 - (Y0 - Y1) * ms / SLOWEST


def right(results):
    """Time of a decoding step over the context, a line for each variant."""
    threads = results["machine"]["threads"]
    drawn = [text(552, 40, f"Decoding step on {threads} CPU cores, ms", "title")]
    for ms in range(0, SLOWEST + 1, 10):
        drawn.append(line(place(0, ms), place(LONGEST, ms), "grid"))
        drawn.append(text(X0 - 10, place(0, ms)[1] + 7, str(ms), "end"))
    for context in (256, 1024, 4096):
        drawn.append(text(place(context, 0)[0], Y0 + 24, f"{context:,}", "middle"))
    drawn.append(line(place(0, 0), place(LONGEST, 0), "axis"))
    drawn.append(text((X0 + X1) / 2, Y0 + 52, f"tokens of context, in each of {BATCH} texts",
                      "middle"))
    ends = []
    for variant, (name, _) in VARIANTS.items():
        key = first(results["records"], variant=variant, match="shape")["shape"]
        points = []
        for timing in results["speed"][key]["decode"]:
            if timing["batch_size"] == BATCH:
                points.append(place(timing["prompt_len"], timing["step_ms"]))
        path = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        drawn.append(f'<path d="M{path}" class="line stroke {name}"/>')
        drawn += [dot(x, y, 5, f"fill {name}") for x, y in points]
        ends.append((points[-1][1], name))
    below = 0
    for y, name in sorted(ends):  # from the top: a name too close to the one above moves down
        below = max(y, below)
        drawn.append(text(X1 + 12, below + 7, name, f"name fill {name}"))
        below += 22
    return drawn


# -- the picture -----------------------------------------------------------------------------------

def first(records, **wanted):
    """The first record with these values."""
    for record in records:
        if all(record[key] == value for key, value in wanted.items()):
            return record
    raise SystemExit(f"{RESULTS} has no record with {wanted}")


def picture(results):
    """The text of head.svg."""
    page = (f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="12" class="page"/>')
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'width="{WIDTH}" height="{HEIGHT}" role="img">')
    title = ("<title>MHA, GQA, MQA and MLA: wiring, cached bytes per token, and time of a "
             "decoding step</title>")
    body = [head, title, f"<style>{STYLE}</style>", page, *left(results), *right(results), "</svg>"]
    return "\n".join(body) + "\n"


def main():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PICTURE.write_text(picture(results), encoding="utf-8")


if __name__ == "__main__":
    main()

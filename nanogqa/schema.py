"""Checks content that is read back from disk as strictly as what a user types.

A schema describes plain values:

    str, (int, str)      a value of that type, or of one of these; True is not an int
    [schema]             a list of any length whose elements match schema
    {"a": x, "b?": y}    a dict with a key "a" that matches x, and "b", which may be missing;
                         further keys are allowed
    {str: schema}        a dict whose keys are text and whose values match schema
    a function           the value for which it returns True, such as count
"""
import json
import math
import re
from pathlib import Path

LARGEST = 2**26  # bytes of a JSON file; a larger one is not read


def check(value, schema, name="the content"):
    """Raises ValueError, which names the part that is wrong, unless value matches schema."""
    if isinstance(schema, list):
        check_type(value, list, name)
        for i, element in enumerate(value):
            check(element, schema[0], f"{name}[{i}]")
    elif isinstance(schema, dict):
        check_dict(value, schema, name)
    elif isinstance(schema, (type, tuple)):
        check_type(value, schema, name)
    elif schema(value) is not True:
        wanted = schema.__name__.replace("_", " ")
        raise ValueError(f"{name} is {shown(value)}, which is not a {wanted}")


def check_dict(value, schema, name):
    check_type(value, dict, name)
    for key, inner in schema.items():
        if key is str:
            for found, content in value.items():
                check_type(found, str, f"a key of {name}")
                check(content, inner, f"{found!r:.60} of {name}")
            continue
        wanted = key.removesuffix("?")
        if wanted in value:
            check(value[wanted], inner, wanted)
        elif wanted == key:
            raise ValueError(f"{name} has no {key}")


def check_type(value, types, name):
    if not isinstance(types, tuple):
        types = (types,)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        wanted = " or ".join(kind.__name__ for kind in types)
        raise ValueError(f"{name} is {shown(value)}, not of type {wanted}")


def shown(value):
    """value for a message if it is a plain one, otherwise its type."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return "a very large number"
    if isinstance(value, (str, int, float, type(None))):
        return f"{value!r:.40}"
    return f"a {type(value).__name__}"


def count(value):
    """A whole number from 0 to 2^62."""
    return type(value) is int and 0 <= value < 2**62


def positive_count(value):
    """A whole number from 1 to 2^62."""
    return count(value) and value > 0


def number(value):
    """A finite number."""
    if type(value) is int:
        return abs(value) < 2**63
    return type(value) is float and math.isfinite(value)


def number_or_none(value):
    """A finite number, or None."""
    return value is None or number(value)


def short_text(value):
    """Printable text of fewer than 200 characters."""
    return isinstance(value, str) and len(value) < 200 and value.isprintable()


def base_name(value):
    """The name of a file without a folder, so that it cannot lead elsewhere."""
    if not isinstance(value, str) or value in ("", ".", ".."):
        return False
    return len(value) < 256 and not re.search(r"[/\\\0\ud800-\udfff]", value)


def sha256(value):
    """A sha256 in hexadecimal."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def read_json(path, schema):
    """The content of a JSON file. Raises ValueError with the reason unless it matches schema, and
    OSError if it cannot be read."""
    path = Path(path)
    if path.stat().st_size > LARGEST:
        raise ValueError(f"it is larger than {LARGEST:,} bytes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check(content, schema)
    return content

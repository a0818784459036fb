"""Settings of a program, read from a dataclass: `program.py [config.py ...] [--key=value ...]`, later wins.

The dataclass is the interface: its fields are the keys, their defaults the defaults and their trailing comments
the text of --help. A config file holds assignments of literals and constant arithmetic; it is parsed, never run.
"""
import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import operator
import os
import re
import sys
import time
import types
import typing


class UserError(Exception):
    """Bad input: one sentence with the cause and the remedy, which the program prints before it exits with code 2."""


def one_line(error, length=200):
    """The text of an exception on one line of at most length characters."""
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split())[:length]


def program(main):
    """Decorates main(argv): a UserError becomes one line on standard error and exit code 2, argv defaults to the shell's."""
    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(sys.argv[1:] if argv is None else list(argv))
        except (UserError, OSError) as error:
            if isinstance(error, BrokenPipeError):  # whoever reads our output has had enough, as in `| head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                raise SystemExit(141) from None
            if isinstance(error, OSError):  # those with a better remedy are UserErrors where they arise
                error = (f"cannot use {str(error.filename)[:100]!r} ({error.strerror}): check the path, its permissions "
                         "and the disk")
            # torchrun ends every rank as soon as one exits: the others wait, so that rank 0 gets to say it, once.
            # A rank whose trouble is its own (a missing disk, say) speaks after the wait.
            if os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1":
                time.sleep(10)
            print(f"{os.path.basename(sys.modules[main.__module__].__file__)}: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None
    return run


def world():
    """(rank, ranks, local rank) of this process, as torchrun sets them; (0, 1, 0) without it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = [os.environ.get(name, default) for name, default in zip(names, ("0", "1", "0"))]
    if all(value.isdecimal() for value in values):
        rank, ranks, local_rank = (int(value) for value in values)
        if max(rank, local_rank) < ranks and (ranks == 1 or "MASTER_ADDR" in os.environ):
            return rank, ranks, local_rank
    found = ", ".join(f"{name}={value}" for name, value in zip(names, values))
    raise UserError(f"{found} is not what torchrun sets: unset these variables, or start with torchrun")


def parse(cls, argv, doc, axes=False):
    """The settings that argv (config files and --key=value) names for the dataclass cls, as {key: value}.

    doc, the program's docstring, heads the --help. With axes, --key=1,2,4 is a list of values.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, doc))
        raise SystemExit(0)
    values = {}
    for arg in argv:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            check_key(cls, key, arg)
            if not equals:
                raise UserError(f"{arg} needs a value: write --{key}=VALUE")
            parts = [convert(cls, key, part, arg) for part in (text.split(",") if axes else [text])]
            values[key] = parts if len(parts) > 1 else parts[0]
        else:
            for key, value in read_config(cls, arg):
                if isinstance(value, str):  # "{out_dir}/gqa" extends the out_dir that is set so far
                    value = value.replace("{" + key + "}", str(values.get(key, getattr(cls, key))))
                values[key] = value
    return values


def combinations(values):
    """Every choice of one value from each list in values, the last list varying fastest."""
    axes = [key for key in values if isinstance(values[key], list)]
    return [{**values, **dict(zip(axes, choice))} for choice in itertools.product(*(values[key] for key in axes))]


def build(cls, values):
    """cls(**values), with a failed check of its __post_init__ as a UserError."""
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:  # TypeError: a checkpoint of another version brought unknown keys or types
        raise UserError(str(error)) from None


def subset(cls, settings):
    """The cls that settings, a dataclass that extends it, contains."""
    return cls(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(cls)})


def read_config(cls, path):
    """The (key, value) assignments of a config file, in order."""
    try:
        with open(path, encoding="utf-8") as f:
            body = ast.parse(f.read()).body
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): pass a config file, or a setting as --key=value") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} is not a config file ({error}): it takes lines like n_kv_head = 2") from None
    for node in body:
        where = f"{path}:{node.lineno}"
        match node:
            case ast.Expr(value=ast.Constant(value=str())):  # the docstring
                continue
            case ast.Assign(targets=[ast.Name(id=key)], value=expression):
                check_key(cls, key, where)
                try:
                    value = literal(expression)
                except (ValueError, ArithmeticError, RecursionError) as error:
                    raise UserError(f"{where}: {key} must be a literal or constant arithmetic ({error})") from None
                yield key, convert(cls, key, value, where)
            case _:
                raise UserError(f"{where}: only assignments like n_kv_head = 2 are read, nothing is executed")


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}


def literal(node):
    """The value of a literal or of arithmetic over numbers."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            if isinstance(value, int) and value >= 2**63:
                raise ValueError("it does not fit into 64 bits")
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -number(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            a, b = number(left), number(right)
            if isinstance(op, ast.Pow) and max(abs(a), abs(b)) > 1000:
                raise ValueError(f"{a}**{b} is too large")
            value = OPERATORS[type(op)](a, b)
            if isinstance(value, complex) or abs(value) >= 2**63 and isinstance(value, int):
                raise ValueError("its value does not fit into 64 bits")
            return value
    raise ValueError(f"found {ast.unparse(node)[:40]!r}")


def number(node):
    value = literal(node)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is not a number")
    return value


def check_key(cls, key, where):
    keys = [f.name for f in dataclasses.fields(cls)]
    if key not in keys:
        close = difflib.get_close_matches(key, keys, n=1)
        hint = f"did you mean {close[0]}?" if close else "--help lists them"
        raise UserError(f"{where}: there is no setting {key!r}, {hint}")


def convert(cls, key, value, where):
    """value, text from the command line or a literal from a file, as the type that cls declares for key."""
    kind = typing.get_type_hints(cls)[key]
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if types.NoneType in kinds and value in (None, "None"):
        return None
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            for choice in typing.get_args(kind):
                if value == choice or value == str(choice):
                    return choice
        elif kind is bool and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        elif kind in (int, float) and not isinstance(value, bool):
            try:
                result = kind(value)
                fits = math.isfinite(result) and (kind is float or abs(result) < 2**63)
                if fits and (isinstance(value, str) or result == value):
                    return result
            except (TypeError, ValueError, OverflowError):
                continue
        elif kind is str and isinstance(value, str) and "\0" not in value:
            return value
    wanted = " or ".join(describe(kind) for kind in kinds)
    raise UserError(f"{where[:100]}: {key} must be {wanted}, not {value!r:.100}")


def describe(kind):
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(str(choice) for choice in typing.get_args(kind))
    return {int: "a whole number", float: "a number", bool: "True or False", str: "text", types.NoneType: "None"}[kind]


def help_text(cls, doc):
    """doc, then every key of cls with its default and its comment, base classes first."""
    comments = {}  # a subclass that declares a key again has the last word
    for base in reversed(cls.__mro__[:-1]):
        comments |= re.findall(r"^    (\w+): [^#\n]*?# (.*)$", inspect.getsource(base), re.M)
    return "\n".join([doc.strip(), "", "settings and their defaults:",
                      *(f"  --{key}={getattr(cls, key)}".ljust(34) + f" {comment}" for key, comment in comments.items())])

"""Settings of a program, read from a dataclass: `program.py [config.py ...] [--key=value ...]`.

The dataclass is the interface: its fields are the keys, their defaults the defaults, and their
trailing comments the text of --help. Later settings win. A config file holds assignments of
literals and constant arithmetic; it is parsed, never executed.
"""
import ast
import contextlib
import dataclasses
import difflib
import errno
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
    """Bad input: one sentence with cause and remedy, which the program prints; exit code 2."""


def one_line(error, length=200):
    """The first length characters of the text of an exception, on one line; control characters,
    which could come from a file and change the terminal, are escaped."""
    text = " ".join(str(error).split()) or type(error).__name__
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text[:length])


UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def plural(n, noun):
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


# torch reports a failed allocation on a CPU, and sizes beyond 64 bits, as an ordinary RuntimeError
NO_MEMORY = re.compile("allocate memory|not enough memory|out of memory|bad_alloc|Invalid buffer "
                       "size|[Ss]torage size calculation overflowed|multiplication overflow")


def out_of_memory(error):
    """Whether an exception says that memory could not be allocated: torch's, numpy's, Python's."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def program(main=None, remedy="use a machine with more of it"):
    """Decorates main(argv): a UserError becomes one line on standard error and exit code 2.

    A failed memory allocation does too; remedy ends its sentence. argv defaults to sys.argv[1:].
    """
    if main is None:
        return functools.partial(program, remedy=remedy)

    @functools.wraps(main)
    def run(argv=None):
        try:
            open_output()
            if sys.platform == "win32":
                raise UserError("Windows has no file locks and signals as this program needs: use "
                                "WSL 2, or Linux or macOS")
            result = main(sys.argv[1:] if argv is None else list(argv))
            sys.stdout.flush()  # a full disk is noticed here, not after the program
            return result
        except BrokenPipeError:  # the reader closed the pipe, as in `| head`
            raise SystemExit(141) from None
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            if out_of_memory(error):
                error = UserError(f"there is not enough memory: {remedy}")
            if not isinstance(error, (UserError, OSError)):
                raise
            report(error, os.path.basename(sys.modules[main.__module__].__file__))
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        finally:
            drop_output()
    return run


def open_output():
    """Makes standard output and error fit for printing: closed ones (`>&-`) discard what is
    printed. On standard output, characters that its encoding lacks become question marks."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:  # otherwise the next file that is opened would get the number
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def drop_output():
    """Discards buffered output that cannot be written: Python would fail on it at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):  # of a stream that is closed
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def report(error, name):
    """Prints an error of the program called name as one line."""
    text = str(error)
    if isinstance(error, OSError):  # those with a better remedy became UserErrors earlier
        why = error.strerror or error
        text = f"cannot write ({why}): check the disk, and where the output goes"
        if error.filename is not None:
            text = (f"cannot use {str(error.filename)[:100]!r} ({why}): check the path, its "
                    "permissions and the disk")
    # torchrun ends every rank as soon as one exits. The others wait, so that rank 0 prints the
    # error, once; a rank with an error of its own (a missing disk) prints it after the wait.
    if os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1":
        time.sleep(10)
    with contextlib.suppress(OSError):
        print(f"{name}: {one_line(text, 1000)}", file=sys.stderr, flush=True)


# -- from the command line to settings -------------------------------------------------------------

def parse(cls, argv, doc, axes=False):
    """The settings of the dataclass cls in argv, config files and --key=value, as {key: value}.

    doc, the program's docstring, heads the --help. With axes, --key=1,2,4 is a list of values, as
    is key = [1, 2, 4] in a config file.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, doc))
        raise SystemExit(0)
    values = {}
    for arg in argv:
        if arg.startswith("--"):
            key, value = read_flag(cls, arg, axes)
            values[key] = value
            continue
        for key, value in read_config(cls, arg, axes):
            if isinstance(value, str):  # "{out_dir}/gqa" extends the out_dir of earlier settings
                before = values.get(key, getattr(cls, key))
                value = value.replace("{" + key + "}", str(before))
            values[key] = value
    return values


def read_flag(cls, arg, axes):
    """(key, value) of --key=value; with axes, value is a list where it has several parts."""
    key, equals, text = arg[2:].partition("=")
    check_key(cls, key, arg)
    if not equals:
        raise UserError(f"{arg} needs a value: write --{key}=VALUE")
    if not axes or "," not in text:
        return key, convert(cls, key, text, arg)
    return key, [convert(cls, key, part, arg) for part in text.split(",")]


def combinations(values):
    """Every choice of one value from each list in values, the last list varying fastest."""
    axes = [key for key in values if isinstance(values[key], list)]
    chosen = []
    for choice in itertools.product(*(values[key] for key in axes)):
        chosen.append({**values, **dict(zip(axes, choice, strict=True))})
    return chosen


def choices_of(given, cls):
    """combinations(given), each once, for programs whose model has several kinds of attention.

    cls.settings_of maps a kind to the settings that belong to it alone: where several kinds are
    listed, a choice leaves out the settings of the others.
    """
    chosen = []
    for values in combinations(given):
        if isinstance(given.get("attention"), list):
            others = settings_of_others(cls, values["attention"])
            values = {key: value for key, value in values.items() if key not in others}
        if values not in chosen:
            chosen.append(values)
    return chosen


def settings_of_others(cls, kind):
    """The settings that belong to other kinds of attention than kind: see cls.settings_of."""
    names = []
    for other, settings in cls.settings_of.items():
        if other != kind:
            names += settings
    return names


def build(cls, values):
    """cls(**values), with a failed check of its __post_init__ as a UserError."""
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:  # TypeError: unknown keys or types in a checkpoint
        raise UserError(str(error)) from None


def subset(cls, settings):
    """A cls with the values that settings, an instance of a subclass of cls, has for its fields."""
    return cls(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(cls)})


def off_default(settings, always=()):
    """The settings that are off their defaults, and those of always, as text for printing.

    Where settings.settings_of says which belong to one kind of attention, those of other kinds are
    left out.
    """
    foreign = settings_of_others(settings, settings.attention)
    shown = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in foreign:
            continue
        if value != field.default or field.name in always:
            shown.append(f"{field.name} {value}")
    return ", ".join(shown)


def in_range(settings, names, low, high=math.inf, below=math.inf):
    """Raises ValueError unless each setting in names, separated by blanks, is None or at least low,
    at most high, and below below."""
    for name in names.split():
        value = getattr(settings, name)
        if value is None:
            continue
        if value < low:
            raise ValueError(f"{name} must be at least {low}, not {value}")
        if value > high:
            raise ValueError(f"{name} must be at most {high}, not {value}")
        if value >= below:
            raise ValueError(f"{name} must be below {below}, not {value}")


def check_pattern(settings, name, example):
    """Raises ValueError unless the named setting is a regular expression."""
    value = getattr(settings, name)
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name}={value!r:.100} is not a regular expression ({error}): write one "
                         f"like {example}") from None


# -- config files ----------------------------------------------------------------------------------

def read_config(cls, path, axes=False):
    """The (key, value) assignments of a config file, in order; with axes, a value may be a list."""
    try:
        with open(path, encoding="utf-8-sig") as f:  # editors may mark UTF-8 at the start
            body = ast.parse(f.read()).body
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): pass a config file, or a setting "
                        "as --key=value") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} is not a config file ({error}): it takes lines like "
                        "n_kv_head = 2") from None
    for node in body:
        where = f"{path}:{node.lineno}"
        match node:
            case ast.Expr(value=ast.Constant(value=str())):  # the docstring
                continue
            case ast.Assign(targets=[ast.Name(id=key)], value=expression):
                check_key(cls, key, where)
                if axes and isinstance(expression, ast.List) and expression.elts:
                    yield key, [value_of(cls, key, part, where) for part in expression.elts]
                else:
                    yield key, value_of(cls, key, expression, where)
            case _:
                raise UserError(f"{where}: only assignments like n_kv_head = 2 are read, nothing "
                                "is executed")


def value_of(cls, key, expression, where):
    """The value of an expression in a config file, as a type that key may have."""
    try:
        value = literal(expression)
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{where}: {key} must be a literal or constant arithmetic ({error})"
                        ) from None
    return convert(cls, key, value, where)


OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def literal(node):
    """The value of a literal, or of arithmetic over numbers. ValueError for anything else."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            if isinstance(value, int) and value >= 2**63:
                raise ValueError("it does not fit into 64 bits")
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -number(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return arithmetic(op, number(left), number(right))
    raise ValueError(f"found {ast.unparse(node)[:40]!r}")


def arithmetic(op, a, b):
    if isinstance(op, ast.Pow) and abs(b) > 1000:  # a result that long is not worth waiting for
        raise ValueError(f"{a}**{b} is too large")
    value = OPERATORS[type(op)](a, b)
    if isinstance(value, complex) or (isinstance(value, int) and abs(value) >= 2**63):
        raise ValueError("its value does not fit into 64 bits")
    return value


def number(node):
    value = literal(node)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is not a number")
    return value


# -- keys and types --------------------------------------------------------------------------------

def check_key(cls, key, where):
    """Raises UserError unless key is a setting of cls."""
    keys = [f.name for f in dataclasses.fields(cls)]
    if key not in keys:
        close = difflib.get_close_matches(str(key), keys, n=1)
        hint = f"did you mean {close[0]}?" if close else "--help lists them"
        raise UserError(f"{where}: unknown setting {key!r}, {hint}")


def kinds_of(cls, key):
    """The types that cls declares for key."""
    kind = typing.get_type_hints(cls)[key]
    if isinstance(kind, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def convert(cls, key, value, where):
    """value, text from the command line or a literal from a file, as a type that key may have.

    Raises UserError if it has none of them.
    """
    kinds = kinds_of(cls, key)
    if types.NoneType in kinds and value in (None, "None"):
        return None
    if value == "" and str in kinds and getattr(cls, key) != "":  # most are paths or names
        raise UserError(f"{where[:100]}: {key} must not be empty: leave it out, or give a value")
    for kind in kinds:
        converted = as_kind(kind, value)
        if converted is not None:
            return converted
    wanted = " or ".join(describe(kind) for kind in kinds)
    raise UserError(f"{where[:100]}: {key} must be {wanted}, not {value!r:.100}")


# no file name can hold these; \udc80 to \udcff may occur: Python's form of bytes that are not UTF-8
NO_TEXT = re.compile("[\\0\ud800-\udc7f\udd00-\udfff]")


def as_kind(kind, value):
    """value as that type; None where it does not have it."""
    if typing.get_origin(kind) is typing.Literal:
        for choice in typing.get_args(kind):
            if as_kind(type(choice), value) == choice:
                return choice
    elif kind is bool:
        return {"true": True, "false": False}.get(str(value).lower())
    elif kind in (int, float) and not isinstance(value, bool):
        return as_number(kind, value)
    elif kind is str and isinstance(value, str) and not NO_TEXT.search(value):
        return value
    return None


def as_number(kind, value):
    try:
        result = kind(value)
        fits = math.isfinite(result) and (kind is float or abs(result) < 2**63)
    except (TypeError, ValueError, OverflowError):
        return None
    same = isinstance(value, str) or result == value  # 2.5 is not a whole number
    return result if fits and same else None


def describe(kind):
    """The name of a type in messages."""
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(str(choice) for choice in typing.get_args(kind))
    return {int: "a whole number", float: "a number", bool: "True or False", str: "text",
            types.NoneType: "None"}[kind]


# -- help ------------------------------------------------------------------------------------------

FIELD = re.compile(r"^    (\w+): .*?# (.*)$")
HEADING = re.compile(r"^    # (\S.*)$")


def help_text(cls, doc):
    """doc, then every key of cls with its default and comment: the program's own settings first.

    A comment line of its own among the fields is a heading.
    """
    lines = [doc.strip(), "", "settings and their defaults:"]
    seen = set()
    for base in cls.__mro__[:-1]:  # a class that declares a key again has the last word
        heading = None
        for line in inspect.getsource(base).splitlines():
            if HEADING.match(line):
                heading = HEADING.match(line)[1]
            field = FIELD.match(line)
            if field and field[1] not in seen:
                if heading:
                    lines += ["", f"{heading}:"]
                    heading = None
                seen.add(field[1])
                lines.append(help_line(cls, field[1], field[2]))
            if line.startswith("    def "):
                break
    return "\n".join(lines)


def help_line(cls, key, comment):
    """The line of one key. It lists the choices of a Literal, unless the comment explains each."""
    kind = kinds_of(cls, key)[0]
    if typing.get_origin(kind) is typing.Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        explained = [re.search(rf"\b{choice}\b", comment) for choice in choices]
        if not all(explained):
            comment += f" ({', '.join(choices)})"
    return f"  --{key}={getattr(cls, key)}".ljust(34) + f" {comment}"

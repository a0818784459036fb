"""The source of the Python standard library on this machine, without its tests. No download.

    python data/python/prepare.py [--tokenizer=gpt2] [--input=FOLDER] [--data_dir=FOLDER]

Each file is a document, in the order of the paths. A tenth of the files, chosen by the hash of the
path, is the validation split.
"""
import platform
import sys
import sysconfig
import tokenize
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nanogqa.configurator import UserError, build, one_line, parse, program
from nanogqa.writer import PrepareConfig, held_out, write_dataset

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def find_files(root):
    """{path relative to root: path} of the Python files below root, sorted."""
    files = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if path.is_file() and not SKIPPED.intersection(relative.parts):
            files[relative.as_posix()] = path
    if not files:
        raise UserError(f"{root} holds no Python source: name a folder that does with --input")
    return dict(sorted(files.items()))


def documents(root):
    """Yields (split, text) for each file."""
    files = find_files(root)
    val = held_out(files)
    for name, path in files.items():
        try:
            with tokenize.open(path) as file:  # decodes as the file declares
                text = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read {path} ({one_line(error)}): fix or remove it, or name another --input"
            ) from None
        split = "train"
        if name in val:
            split = "val"
        yield split, text


@program
def main(argv):
    config = build(PrepareConfig, parse(PrepareConfig, argv, __doc__))
    root = Path(config.input or sysconfig.get_path("stdlib"))
    data_dir = config.data_dir or Path(__file__).parent
    print(f"Python {platform.python_version()}, source from {root}")
    write_dataset(
        documents(root), data_dir, config.tokenizer, config.overwrite,
        source="Python standard library", python=platform.python_version(),
    )


if __name__ == "__main__":
    main()

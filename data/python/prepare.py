"""The source of the Python standard library on this machine, without its tests, as a data set. No download.

    python data/python/prepare.py [--tokenizer=gpt2] [--input=FOLDER] [--data_dir=FOLDER]

One document a file, in the order of their paths; a tenth of the files, by a hash of the path, validates.
"""
import platform
import sys
import sysconfig
import tokenize
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nanogqa.configurator import UserError, build, parse, program
from nanogqa.writer import PrepareConfig, held_out, write_dataset

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def documents(root):
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py") if path.is_file()}
    names = sorted(name for name in paths if not SKIPPED & set(name.split("/")))
    if not names:
        raise UserError(f"{root} holds no Python source: name a folder that does with --input")
    val = held_out(names)
    for name in names:
        try:
            with tokenize.open(paths[name]) as f:  # reads the encoding that the file declares
                text = f.read()
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {paths[name]} ({error}): mend or remove it, or name another --input") from None
        yield "val" if name in val else "train", text


@program
def main(argv):
    config = build(PrepareConfig, parse(PrepareConfig, argv, __doc__))
    root = Path(config.input or sysconfig.get_path("stdlib"))
    print(f"Python {platform.python_version()}, source from {root}")
    write_dataset(documents(root), config.data_dir or Path(__file__).parent, config.tokenizer, config.overwrite,
                  source="Python standard library", python=platform.python_version())


if __name__ == "__main__":
    main()

"""The source of the Python standard library on this machine, without its tests. No download.

    python data/python/prepare.py [--tokenizer=gpt2] [--input=FOLDER] [--data_dir=FOLDER]

Each file is a document, in the order of the paths. A tenth of the files, chosen by the hash of the
path, is the validation split. Files that cannot be decoded are skipped and counted.
"""
import platform
import sys
import sysconfig
import tokenize
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))  # data/ may be a link
from nanogqa.configurator import UserError, build, parse, program
from nanogqa.writer import PrepareConfig, documents_of_files, input_files, write_dataset

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def find_files(root, data_dir):
    """{path relative to root: path} of the Python files below root, sorted."""
    if root.is_file():
        raise UserError(f"{root} is a file: name a folder of Python source with --input")
    files = {}
    for name, path in input_files(root, "*.py", data_dir).items():
        if not SKIPPED.intersection(name.split("/")):
            files[name] = path
    if not files:
        raise UserError(f"{root} holds no Python source: name a folder that does with --input")
    return files


def read(path):
    """The text of a file, decoded as it declares. Raises ValueError if it is not Python source."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        text.encode()  # codecs like unicode_escape give text that UTF-8 cannot store
    except (SyntaxError, LookupError) as error:  # an unknown codec
        raise ValueError(str(error)) from None
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): fix or remove it, or name another --input"
        ) from None
    if "\0" in text:
        raise ValueError("it holds null bytes")
    return text


@program
def main(argv):
    config = build(PrepareConfig, parse(PrepareConfig, argv, __doc__))
    root = Path(config.input or sysconfig.get_path("stdlib"))
    data_dir = config.data_dir or Path(__file__).parent
    source = "Python standard library"
    if config.input is not None:
        source = root.resolve().name
    print(f"Python {platform.python_version()}, source from {root}")
    documents = documents_of_files(find_files(root, data_dir), read, "Python source")
    write_dataset(documents, data_dir, config.tokenizer, config.overwrite, source=source,
                  python=platform.python_version())


if __name__ == "__main__":
    main()

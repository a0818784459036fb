"""Any text: a file, or all text files of a folder, one document each.

    python data/text/prepare.py --input=FILE_OR_FOLDER [--tokenizer=gpt2] [--data_dir=FOLDER]

The validation split is the last 10 % of a file, or a tenth of the files of a folder, chosen by the
hash of the path. Files in a folder that are not UTF-8 are skipped and counted; data sets in it are
left out.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))  # data/ may be a link
from nanogqa.configurator import UserError, build, parse, program
from nanogqa.writer import PrepareConfig, documents_of_files, input_files, write_dataset


def read(path):
    """The text of a file. Raises UnicodeDecodeError, a ValueError, if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): fix or remove it, or name another "
                        "--input") from None


def documents_of_file(path):
    """Yields (split, text): the first 90 % and the last 10 % of a file."""
    try:
        text = read(path)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first"
        ) from None
    cut = int(len(text) * 0.9)
    yield "train", text[:cut]
    yield "val", text[cut:]


@program(remedy="split the text into a folder of smaller files")
def main(argv):
    config = build(PrepareConfig, parse(PrepareConfig, argv, __doc__))
    if config.input is None:
        raise UserError("no text is named: name a text file or a folder with --input=PATH")
    if not Path(config.input).exists():
        raise UserError(
            f"there is nothing to read at {config.input}: name a text file or a folder with "
            "--input=PATH"
        )
    source = Path(config.input)
    data_dir = config.data_dir or Path(__file__).parent
    if source.is_dir():
        documents = documents_of_files(input_files(source, "*", data_dir), read, "UTF-8")
    else:  # a file, or a pipe
        documents = documents_of_file(source)
    write_dataset(documents, data_dir, config.tokenizer, config.overwrite, source=source.name)


if __name__ == "__main__":
    main()

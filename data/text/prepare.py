"""Any text as a data set: a file, or all the text files of a folder, one document a file.

    python data/text/prepare.py --input=FILE_OR_FOLDER [--tokenizer=gpt2] [--data_dir=FOLDER]

Of one file the last 10 % validates, of a folder a tenth of the files, by a hash of the path. Files that are not UTF-8
are left out of a folder, and counted.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nanogqa.configurator import UserError, build, parse, program
from nanogqa.writer import PrepareConfig, held_out, write_dataset


def documents(source):
    if source.is_file():
        try:
            text = source.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{source} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from None
        cut = int(len(text) * 0.9)
        yield "train", text[:cut]
        yield "val", text[cut:]
        return
    paths = {path.relative_to(source).as_posix(): path for path in source.rglob("*") if path.is_file()}
    val = held_out(paths)
    skipped = []
    for name in sorted(paths):
        try:
            text = paths[name].read_bytes().decode()
        except UnicodeDecodeError:
            skipped.append(name)
            continue
        except OSError as error:
            raise UserError(f"cannot read {paths[name]} ({error.strerror}): mend or remove it") from None
        yield "val" if name in val else "train", text
    if skipped:
        print(f"left out, because they are not UTF-8: {len(skipped)} files ({skipped[0]}, ...)")


@program
def main(argv):
    config = build(PrepareConfig, parse(PrepareConfig, argv, __doc__))
    if config.input is None or not Path(config.input).exists():
        raise UserError(f"there is nothing to read at {config.input}: name a text file or a folder with --input=PATH")
    write_dataset(documents(Path(config.input)), config.data_dir or Path(__file__).parent, config.tokenizer,
                  config.overwrite, source=Path(config.input).name)


if __name__ == "__main__":
    main()

"""Tiny Shakespeare (Karpathy, char-rnn): 1,115,394 bytes, the first 90 % to train, the last 10 % to validate.

    python data/shakespeare/prepare.py [--tokenizer=gpt2] [--input=FILE] [--data_dir=FOLDER]
"""
import hashlib
import sys
import urllib.request
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nanogqa.configurator import UserError, build, parse, program
from nanogqa.writer import PrepareConfig, write_dataset

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def read(path):
    """The bytes of the text, from a file or else from the network."""
    try:
        if path is not None:
            return Path(path).read_bytes()
        with urllib.request.urlopen(URL, timeout=30) as response:
            size = int(response.headers["Content-Length"] or 0) or None
            with tqdm.wrapattr(response, "read", total=size, desc="downloading", disable=None) as stream:
                return stream.read()
    except OSError as error:  # of which a failed download is one
        raise UserError(f"cannot read {path or URL} ({error}): get the file elsewhere and pass it as --input=FILE") from None


@program
def main(argv):
    config = build(PrepareConfig, parse(PrepareConfig, argv, __doc__))
    raw = read(config.input)
    if hashlib.sha256(raw).hexdigest() != SHA256:
        raise UserError(f"{config.input or URL} is not tiny Shakespeare (another sha256): other text goes through "
                        "data/text/prepare.py")
    text = raw.decode()
    cut = int(len(text) * 0.9)
    write_dataset([("train", text[:cut]), ("val", text[cut:])], config.data_dir or Path(__file__).parent,
                  config.tokenizer, config.overwrite, source="tiny Shakespeare")


if __name__ == "__main__":
    main()

"""Tiny Shakespeare (Karpathy, char-rnn): 1,115,394 bytes. The last 10 % is the validation split.

    python data/shakespeare/prepare.py [--tokenizer=gpt2] [--input=FILE] [--data_dir=FOLDER]
"""
import hashlib
import http.client
import sys
import time
import urllib.request
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))  # data/ may be a link
from nanogqa.configurator import UserError, build, one_line, parse, program
from nanogqa.writer import PrepareConfig, write_dataset

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SIZE = 1_115_394  # bytes
PATIENCE = 300    # seconds for the download
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def download():
    """The bytes at URL, one more than SIZE at most. Raises OSError if the download fails."""
    raw = b""
    end = time.monotonic() + PATIENCE
    bar = tqdm(total=SIZE, desc="downloading", unit="B", unit_scale=True, disable=None)
    with urllib.request.urlopen(URL, timeout=30) as response, bar:
        while len(raw) <= SIZE:
            part = response.read1(SIZE + 1 - len(raw))
            if not part:
                break
            raw += part
            bar.update(len(part))
            if time.monotonic() > end:
                raise OSError(f"not complete after {PATIENCE} s")
    return raw


def read_text(path):
    """The text, from path or downloaded. Raises UserError if it is another text."""
    try:
        if path is None:
            raw = download()
        else:
            raw = Path(path).read_bytes()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot read {path or URL} ({one_line(error)}): get the file another way and pass it "
            "as --input=FILE"
        ) from None
    if hashlib.sha256(raw).hexdigest() != SHA256:
        remedy = "prepare other text with data/text/prepare.py"
        if path is None:  # perhaps the connection was cut
            remedy = "run this again, or get the file another way and pass it as --input=FILE"
        raise UserError(f"{path or URL} is not tiny Shakespeare (another sha256): {remedy}")
    return raw.decode()


@program
def main(argv):
    config = build(PrepareConfig, parse(PrepareConfig, argv, __doc__))
    text = read_text(config.input)
    cut = int(len(text) * 0.9)
    documents = [("train", text[:cut]), ("val", text[cut:])]
    data_dir = config.data_dir or Path(__file__).parent
    write_dataset(
        documents, data_dir, config.tokenizer, config.overwrite, source="tiny Shakespeare"
    )


if __name__ == "__main__":
    main()

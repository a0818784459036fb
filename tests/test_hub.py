"""Data sets from parquet files on a local stand-in for the Hub; splits of many and large files."""

import contextlib
import copy
import errno
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
from test_inputs import ROOT, fails, program

from nanogqa import files
from nanogqa.configurator import UserError
from nanogqa.dataloader import Dataset
from nanogqa.writer import write_dataset

main = program("hub")
hub = sys.modules["prepare_hub"]
COMMIT = hashlib.sha1(b"newest").hexdigest()
REVISION = "/api/datasets/some/text/revision/refs/convert/parquet"
TREE = f"/api/datasets/some/text/tree/{COMMIT}/"
LIST = f"{TREE}part/train"
FILES = [f"/datasets/some/text/resolve/{COMMIT}/part/train/{i:04d}.parquet" for i in range(3)]


def texts(n, seed=0):
    rng = random.Random(seed)
    made = []
    for _ in range(n):
        text = "".join(rng.choices("abc é🙂\n", k=rng.randint(0, 40)))
        made.append(text + rng.choice(["", "<|endoftext|>"]))
    return made


def in_val(text, fraction):
    """Whether a text belongs to the validation split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < fraction * 2**64


def parquet(path, column):
    """Writes a parquet file with the texts in column. Returns its bytes."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    text = pyarrow.array(column, pyarrow.string())
    write_table(pyarrow.table(dict(id=range(len(column)), text=text)), path, row_group_size=300)
    return path.read_bytes()


class Hub(http.server.ThreadingHTTPServer):
    """A stand-in for the Hub: one data set, some/text, of three files with 1,000 documents each.

    files: content by path.
    errors: X-Error-Code by missing path.
    asked: (path, Range) of each GET.
    plan: by path, what happens to the next GETs: a number of bytes until the connection drops,
        (status,), or other content. Under "HEAD PATH" the statuses of the next HEADs.
    """

    daemon_threads = True

    def __init__(self, documents, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.ranges = True  # whether it honours Range
        self.asked = []
        self.tokens = []  # Authorization of each GET
        self.plan = {}
        self.errors = {}
        self.documents = documents
        self.files = {
            path: parquet(folder / "made.parquet", column)
            for path, column in zip(FILES, documents, strict=True)
        }
        self.files[REVISION] = json.dumps(dict(id="some/text", sha=COMMIT)).encode()
        self.files[LIST] = listing("part/train", [f"{i:04d}.parquet" for i in range(3)])


def listing(folder, names):
    """The Hub's answer to a request for the tree at folder, in another order than sorted."""
    entries = [dict(type="file", path=f"{folder}/{name}", size=9, oid="0") for name in names[::-1]]
    return json.dumps([dict(type="directory", path=f"{folder}/a.d", oid="0"), *entries]).encode()


class Handler(http.server.BaseHTTPRequestHandler):
    timeout = 60  # seconds of silence

    def do_HEAD(self):
        path = unquote(self.path.partition("?")[0])
        plan = self.server.plan.get(f"HEAD {path}", [])
        later = self.server.plan.get(path, [])
        content = self.server.files.get(path)
        if later and isinstance(later[0], bytes):
            content = later[0]  # the GET will find this content, too
        self.answer(path, plan.pop(0) if plan else None, content, 0)

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        self.server.asked.append((path, self.headers["Range"]))
        self.server.tokens.append(self.headers["Authorization"])
        plan = self.server.plan.get(path, [])
        how = plan.pop(0) if plan else None
        content = how if isinstance(how, bytes) else self.server.files.get(path)
        start = 0
        if self.server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "bytes=0-")[1])
        sent = self.answer(path, how, content, start)
        if sent:
            self.wfile.write(content[start : start + how if isinstance(how, int) else None])

    def answer(self, path, how, content, start):
        """Sends the header. Returns whether content follows."""
        if content is None or isinstance(how, tuple):
            self.send_response(how[0] if how else 404)
            if how is None and path in self.server.errors:
                self.send_header("X-Error-Code", self.server.errors[path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return False
        if start >= len(content) > 0:
            self.send_error(416)
            return False
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        return True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The stand-in for the Hub. Waits between tries are a thousand times shorter."""
    pytest.importorskip("huggingface_hub")
    import huggingface_hub.constants

    # another test of this process may have switched it off, and the library reads it at import
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 1000))
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)  # resumes from these
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub, "BATCH", 128)
    documents = [texts(1000, seed) for seed in range(3)]
    documents[1][3] = None
    server = Hub(documents, tmp_path)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def arguments(server, folder, *more):
    return [
        "--repo=some/text",
        "--subset=part",
        "--tokenizer=byte",
        f"--endpoint={server.url}",
        "--tokens_per_file=20000",
        "--val_fraction=0.05",
        f"--data_dir={folder}",
        *more,
    ]


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def decoded(split):
    ids = split.windows([0], split.n_tokens)[0]
    assert ids[-1] == 256
    return [
        bytes(document[:-1].astype(np.uint8)).decode()
        for document in np.split(ids, np.flatnonzero(ids == 256) + 1)[:-1]
    ]


def test_documents_stay_whole_and_in_order(server, tmp_path, capsys):
    main(arguments(server, tmp_path / "out"))
    data = Dataset(tmp_path / "out")
    want = [text for column in server.documents for text in column if text is not None]
    val = {text for text in want if in_val(text, 0.05)}
    assert decoded(data.train) == [text for text in want if text not in val]
    assert decoded(data.val) == [text for text in want if text in val] and 50 < data.val.n_tokens
    assert data.train.n_bytes == sum(len(text.encode()) for text in want if text not in val)
    files = data.meta["splits"]["train"]
    assert len(files) > 3
    assert [file["name"] for file in files] == [f"train_{i:05d}.bin" for i in range(len(files))]
    for file in files:  # a file is full with the document that reaches tokens_per_file
        ids = np.fromfile(tmp_path / "out" / file["name"], "<u2")
        assert len(ids) == file["tokens"] and ids[-1] == 256
        if file is not files[-1]:
            assert len(ids) >= 20000 > np.flatnonzero(ids[:-1] == 256)[-1] + 1
    sums = ""
    for file in [*files, *data.meta["splits"]["val"]]:
        digest = hashlib.sha256((tmp_path / "out" / file["name"]).read_bytes()).hexdigest()
        sums += f"{digest}  {file['name']}\n"
    assert data.meta["sha256"] == hashlib.sha256(sums.encode()).hexdigest()
    assert data.meta["sha256"][:16] in capsys.readouterr().out
    assert sorted(content(tmp_path / "out")) == sorted(
        ["meta.json", "val.bin", *(file["name"] for file in files)]
    )
    assert [path for path, _ in server.asked] == [REVISION, LIST, *FILES]
    assert data.meta["commit"] == COMMIT
    server.asked.clear()
    main(arguments(server, tmp_path / "out"))  # it is already there
    assert not server.asked


def test_workers_batches_and_folders_change_nothing(server, tmp_path, monkeypatch):
    main(arguments(server, tmp_path / "out"))
    monkeypatch.setattr(hub, "BATCH", 77)
    monkeypatch.setattr(hub, "PART", 3)
    main(arguments(server, tmp_path / "one", "--workers=1"))
    assert content(tmp_path / "one") == content(tmp_path / "out")
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / f"in/{i}.parquet").write_bytes(server.files[FILES[i]])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    main(
        [
            "--tokenizer=byte",
            "--tokens_per_file=20000",
            "--val_fraction=0.05",
            f"--input={tmp_path / 'in'}",
            f"--data_dir={tmp_path / 'local'}",
        ]
    )
    assert Dataset(tmp_path / "local").meta["sha256"] == Dataset(tmp_path / "out").meta["sha256"]
    assert len(list((tmp_path / "in").iterdir())) == 3


def test_max_tokens_ends_with_the_document_that_reaches_it(server, tmp_path):
    main(arguments(server, tmp_path / "all"))
    want = [text for column in server.documents for text in column if text is not None]
    lengths = np.cumsum([len(text.encode()) + 1 for text in want])
    for limit in (5000, int(lengths[600]), int(lengths[600]) + 1, int(lengths[1200])):
        main(arguments(server, tmp_path / str(limit), f"--max_tokens={limit}"))
        data, whole = Dataset(tmp_path / str(limit)), Dataset(tmp_path / "all")
        total = data.train.n_tokens + data.val.n_tokens
        assert total == lengths[np.searchsorted(lengths, limit)]
        for some, every in ((data.train, whole.train), (data.val, whole.val)):
            assert (some.windows([0], some.n_tokens) == every.windows([0], some.n_tokens)).all()


@pytest.mark.parametrize("ranges", [True, False])
def test_dropped_connections_and_busy_servers(server, tmp_path, ranges):
    main(arguments(server, tmp_path / "out"))
    server.asked.clear()
    server.ranges = ranges
    server.plan = {
        FILES[1]: [1000, 0, (503,), 2000, (429,)],
        f"HEAD {FILES[1]}": [(500,), (503,)],
        REVISION: [(500,), 10],
        LIST: [(500,), 10],
    }
    main(arguments(server, tmp_path / "again"))
    assert content(tmp_path / "again") == content(tmp_path / "out")
    assert not any(server.plan.values())
    starts = [
        int((header or "bytes=0-")[6:-1]) for path, header in server.asked if path == FILES[1]
    ]
    assert len(starts) == 6 and starts[:2] == [0, 1000] and 2000 in starts  # resumes what arrived


def test_a_corrupt_file_is_downloaded_once_more(server, tmp_path, capsys):
    main(arguments(server, tmp_path / "out"))
    good = server.files[FILES[1]]
    middle = len(good) // 2
    for bad in (good[:-4] + b"oops", b"<html>", good[:middle] + bytes(200) + good[middle + 200 :]):
        server.plan = {FILES[1]: [bad]}
        server.asked.clear()
        main(
            arguments(server, tmp_path / "again", "--overwrite=True", f"--tokens_per_file={20000}")
        )
        assert content(tmp_path / "again") == content(tmp_path / "out")
        assert [path for path, _ in server.asked].count(FILES[1]) == 2
        (tmp_path / "again/meta.json").unlink()
    server.plan = {FILES[1]: [b"no", b"parquet"]}
    server.asked.clear()
    error = fails(main, arguments(server, tmp_path / "third"), capsys)
    assert "part/train/0001.parquet is not a sound parquet file" in error
    assert not (tmp_path / "third/meta.json").exists()
    main(arguments(server, tmp_path / "third"))  # fixed on the server
    assert content(tmp_path / "third") == content(tmp_path / "out")
    assert [path for path, _ in server.asked].count(FILES[0]) == 1


@pytest.mark.parametrize(
    "kill_at,save", [(1, 0), (900, 0), (1700, 0), (1700, 99), (2500, 0), (2998, 0)]
)
def test_a_run_goes_on_where_it_stopped(server, tmp_path, monkeypatch, kill_at, save):
    """The run stops at a document; what the files hold beyond the recorded length is cut off."""
    main(arguments(server, tmp_path / "out"))
    server.asked.clear()
    monkeypatch.setattr(hub, "SAVE_SECONDS", save)
    add, added = hub.DatasetWriter.add, []

    def counted(self, *args):
        added.append(args)
        if len(added) == kill_at:
            for file, _ in self.open.values():
                file.flush()
            raise KeyboardInterrupt
        add(self, *args)

    monkeypatch.setattr(hub.DatasetWriter, "add", counted)
    with pytest.raises(SystemExit):
        main(arguments(server, tmp_path / "again"))
    assert not (tmp_path / "again/meta.json").exists()
    main(arguments(server, tmp_path / "again"))
    assert content(tmp_path / "again") == content(tmp_path / "out")
    assert sorted(path for path, _ in server.asked) == sorted([REVISION, LIST, *FILES])
    if not save:
        assert len(added) < 3000 + 128 + 2
    elif kill_at > 1000:
        assert len(added) < 3000 + kill_at - 1000 + 2


def test_what_a_killed_download_left_does_no_harm(server, tmp_path):
    """Whatever is in the download folder, the result is the same and the folder goes."""
    main(arguments(server, tmp_path / "out"))
    server.plan = {FILES[1]: [500, (404,)]}
    with pytest.raises(SystemExit):
        main(arguments(server, tmp_path / "again"))
    left = tmp_path / "again/hub.part/download/.cache/huggingface/download/part/train"
    left.mkdir(parents=True, exist_ok=True)
    (left / "0001.parquet.abc.incomplete").write_bytes(bytes(10**6))
    server.asked.clear()
    main(arguments(server, tmp_path / "again"))
    assert [path for path, _ in server.asked] == FILES[1:]
    assert content(tmp_path / "again") == content(tmp_path / "out")


def test_a_run_goes_on_after_it_was_killed_while_finishing(server, tmp_path, monkeypatch):
    main(arguments(server, tmp_path / "out"))
    replace, finish = os.replace, hub.DatasetWriter.finish
    for kill_at in (1, 3, 5):
        moved = []

        def counted(source, target, moved=moved, kill_at=kill_at):
            moved.append(target)
            if len(moved) == kill_at:
                raise KeyboardInterrupt
            replace(source, target)

        folder = tmp_path / str(kill_at)
        with monkeypatch.context() as patch:

            def finish_and_die(*args, patch=patch, counted=counted):
                patch.setattr(os, "replace", counted)
                return finish(*args)

            patch.setattr(hub.DatasetWriter, "finish", finish_and_die)
            with pytest.raises(SystemExit):
                main(arguments(server, folder))
        assert len(moved) == kill_at and not (folder / "meta.json").exists()
        main(arguments(server, folder))
        assert content(folder) == content(tmp_path / "out")


def test_kill_9(server, tmp_path):
    """A process that is killed while the third file is downloaded."""
    main(arguments(server, tmp_path / "out"))
    server.asked.clear()
    server.plan = {FILES[2]: [500] + [(503,)] * 100}
    command = [sys.executable, "data/hub/prepare.py", *arguments(server, tmp_path / "again")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while sum(path == FILES[2] for path, _ in server.asked) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert (tmp_path / "again/hub.part/train_00000.bin").exists() and not (
        tmp_path / "again/meta.json"
    ).exists()
    server.plan.clear()
    server.asked.clear()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=100)
    assert content(tmp_path / "again") == content(tmp_path / "out")
    assert server.asked == [(FILES[2], None)]


@pytest.mark.parametrize(
    "args,words",
    [
        (["--val_fraction=1"], "val_fraction must be between 0 and 1"),
        (["--max_tokens=0"], "max_tokens must be at least 1"),
        (["--workers=0"], "workers must be at least 1"),
        (["--tokens_per_file=0"], "tokens_per_file must be at least 1"),
        (["--colum=text"], "did you mean column?"),
        (["--tokenizer=nonsense"], "there is no tokenizer 'nonsense'"),
        (
            ["--subset=other"],
            "no parquet files for other/train: check --repo, --subset and --split",
        ),
        (["--split=other"], "no parquet files for part/other: check --repo, --subset and --split"),
        (["--subset=a/b"], "subset must be a name without slashes"),
        (["--split=.."], "split must be a name"),
        (["--revision=main"], "revision must be a commit of 40 hex digits"),
        (["--repo=a b"], "cannot be a data set: write --repo=OWNER/NAME"),
        (["--repo=other/text"], "there is no data set 'other/text' at"),
        ([f"--revision={'0' * 40}"], "no parquet files at 0000"),
        (["--endpoint=ftp:/x"], "is not the address of a Hub"),
        (["--endpoint=http://["], "is not the address of a Hub"),
        (["--endpoint=http://[::1"], "is not the address of a Hub"),
        (["--endpoint=https://a:b"], "is not the address of a Hub"),
        (["--endpoint=https://"], "is not the address of a Hub"),
        (["--endpoint=file:///etc/passwd"], "is not the address of a Hub"),
        (["--endpoint=https://\udcff"], "is not the address of a Hub"),
        ([f"--endpoint=https://{'é' * 70}"], "is not the address of a Hub"),
        (["--subset=\udcff"], "subset must be a name"),
        (["--input=/no/such"], "there are no parquet files at /no/such: name"),
        (["--column=words"], "no column of text 'words': choose --column from text"),
        (["--column=id"], "--column from text"),
        (["--val_fraction=1e-9"], "no text for the val split"),
        (["--endpoint=http://127.0.0.1:1"], "6 times in a row): run the same command later"),
    ],
)
def test_bad_settings(server, tmp_path, capsys, args, words):
    server.errors = {"/api/datasets/other/text/revision/refs/convert/parquet": "RepoNotFound"}
    for folder in ("other/train", "other/partial-train", "part/other", "part/partial-other"):
        server.errors[f"{TREE}{folder}"] = "EntryNotFound"
        server.errors[f"{TREE.replace(COMMIT, '0' * 40)}{folder}"] = "RevisionNotFound"
    server.errors[LIST.replace(COMMIT, "0" * 40)] = "RevisionNotFound"
    assert words in fails(main, arguments(server, tmp_path / "out", *args), capsys)
    assert not list(tmp_path.glob("out/*.*n"))


@pytest.mark.parametrize("path", [LIST, REVISION])
@pytest.mark.parametrize(
    "answer",
    [
        b"{}",
        b"[]",
        b"[1]",
        b'["/etc/passwd"]',
        b"<html>",
        b"7",
        b'{"error": "no"}',
        b"[" * 10**5,
        b'{"id": "some/text", "sha": "../main"}',
        b'{"id": "some/text"}',
        listing("part/train/..", ["0000.parquet"]),
        listing("/etc", ["passwd"]),
    ],
)
def test_a_list_that_is_none(server, tmp_path, capsys, path, answer):
    server.files[path] = answer
    server.errors[f"{TREE}part/partial-train"] = "EntryNotFound"
    error = fails(main, arguments(server, tmp_path / "out"), capsys)
    if path == LIST and (answer in (b"{}", b"[]") or answer.startswith(b"[{")):
        assert "has no parquet files for part/train: check --repo" in error  # none that fits
    else:
        assert "answers 'some/text' differently from the Hub" in error
    assert not (tmp_path / "out").exists()


def test_a_large_data_set_is_there_in_part(server, tmp_path):
    """Of a large data set the Hub keeps the first gigabytes, in a folder with another name."""
    main(arguments(server, tmp_path / "out"))
    del server.files[LIST]
    server.errors[LIST] = "EntryNotFound"
    server.files[f"{TREE}part/partial-train"] = listing(
        "part/partial-train", ["0000.parquet", "0001.parquet"]
    )
    for i in range(2):
        server.files[FILES[i].replace("train", "partial-train")] = server.files.pop(FILES[i])
    main(arguments(server, tmp_path / "part"))
    some, every = Dataset(tmp_path / "part").train, Dataset(tmp_path / "out").train
    n = some.n_tokens
    assert 0 < n < every.n_tokens and (some.windows([0], n) == every.windows([0], n)).all()


def test_a_data_set_keeps_its_commit(server, tmp_path, capsys):
    """The newest commit is looked up once; --revision names one, and another one is another set."""
    server.plan = {FILES[1]: [(404,)]}
    assert "0001.parquet answers 404: check --repo" in fails(
        main, arguments(server, tmp_path / "out"), capsys
    )
    server.files[REVISION] = json.dumps(dict(id="some/text", sha="1" * 40)).encode()
    server.asked.clear()
    assert "unfinished data set with other settings" in fails(
        main, arguments(server, tmp_path / "out", f"--revision={'1' * 40}"), capsys
    )
    main(arguments(server, tmp_path / "out"))
    assert [path for path, _ in server.asked] == FILES[1:]
    assert Dataset(tmp_path / "out").meta["commit"] == COMMIT
    server.asked.clear()
    main(arguments(server, tmp_path / "again", f"--revision={COMMIT}"))
    assert [path for path, _ in server.asked] == [LIST, *FILES]
    assert content(tmp_path / "again") == content(tmp_path / "out")
    main(arguments(server, tmp_path / "out", f"--revision={COMMIT}"))
    assert "data set with other settings" in fails(
        main, arguments(server, tmp_path / "out", f"--revision={'1' * 40}"), capsys
    )


def test_gated_data_and_tokens(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    gated = server.files.pop(REVISION)
    server.errors[REVISION] = "GatedRepo"
    error = fails(main, arguments(server, tmp_path / "out"), capsys)
    page = f"{server.url}/datasets/some/text"
    assert f"is gated: accept its terms at {page}, and set HF_TOKEN" in error
    assert "hf_secret" not in error and len(server.asked) == 1 and not (tmp_path / "out").exists()
    server.files[REVISION] = gated
    server.plan = {f"HEAD {FILES[0]}": [(403,)]}
    assert "0000.parquet answers 403: check --repo, --subset, --split and HF_TOKEN" in fails(
        main, arguments(server, tmp_path / "out"), capsys
    )
    main(arguments(server, tmp_path / "out"))
    assert set(server.tokens) == {"Bearer hf_secret"}
    for file in (tmp_path / "out").iterdir():
        assert b"hf_secret" not in file.read_bytes()


def test_what_ends_a_run_and_what_is_tried_again(server, tmp_path):
    """A storage server refuses addresses that have expired: the Hub gives a new one."""
    from huggingface_hub import errors

    client = hub.Hub(hub.HubConfig(endpoint=server.url))
    with pytest.raises(UserError, match="unset it, or pass --input=FOLDER"):
        client.raise_if_refused(errors.OfflineModeIsEnabled())
    for url, status in (("https://storage/x", 403), (server.url, 429), (server.url, 500)):
        client.raise_if_refused(
            SimpleNamespace(response=SimpleNamespace(url=url, status_code=status))
        )
    with pytest.raises(UserError, match="/x answers 403: check"):
        client.raise_if_refused(
            SimpleNamespace(response=SimpleNamespace(url=f"{server.url}/x?key=1", status_code=403))
        )


def test_a_disk_that_fails_is_not_the_network(server, tmp_path, capsys, monkeypatch):
    import huggingface_hub.file_download

    calls = []

    def full(*args, **kwargs):
        calls.append(args)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    error = fails(main, arguments(server, tmp_path / "out"), capsys)
    assert "(No space left on device): pass another --data_dir" in error and len(calls) == 1


def test_local_files_of_the_same_names_with_other_content(server, tmp_path, capsys):
    """With --overwrite=True they were called the same data set, and the old one stayed."""
    for i in range(2):
        (tmp_path / f"{i}/in").mkdir(parents=True)
        (tmp_path / f"{i}/in/a.parquet").write_bytes(server.files[FILES[i]])
    args = ["--tokenizer=byte", "--val_fraction=0.05", f"--data_dir={tmp_path / 'out'}"]
    main([*args, f"--input={tmp_path / '0/in'}"])
    before = content(tmp_path / "out")
    main([*args, f"--input={tmp_path / '1/in'}"])
    assert "already holds this data set" in capsys.readouterr().out and content(tmp_path / "out") == before
    main([*args, f"--input={tmp_path / '1/in'}", "--overwrite=True"])
    assert content(tmp_path / "out") != before


def test_a_finished_data_set_with_other_bytes_is_prepared_again(server, tmp_path, capsys):
    """It was called the same data set, although train.py said to run this program. A newer commit changes nothing."""
    main(arguments(server, tmp_path / "out"))
    server.files[REVISION] = json.dumps(dict(id="some/text", sha="1" * 40)).encode()
    before = content(tmp_path / "out")
    path = next((tmp_path / "out").glob("train*.bin"))
    ids = bytearray(path.read_bytes())
    ids[0] ^= 1
    path.write_bytes(ids)
    capsys.readouterr()
    main(arguments(server, tmp_path / "out"))
    assert "already holds" not in capsys.readouterr().out and content(tmp_path / "out") == before
    main(arguments(server, tmp_path / "out"))
    assert "already holds" in capsys.readouterr().out


def test_two_processes_do_not_prepare_one_folder(server, tmp_path, capsys):
    """Both wrote to the same files, and zeros were left where neither had written."""
    (tmp_path / "out").mkdir()
    with files.lock(tmp_path / "out", "the first"):
        before = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert "another process prepares" in fails(main, arguments(server, tmp_path / "out"), capsys)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    main(arguments(server, tmp_path / "out"))


def test_local_files_that_go_away(server, tmp_path, capsys, monkeypatch):
    """The files of the first run are the ones that count: new ones are left out."""
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / f"in/{i}.parquet").write_bytes(server.files[FILES[i]])
    args = ["--tokenizer=byte", "--val_fraction=0.05", f"--input={tmp_path / 'in'}"]
    main([*args, f"--data_dir={tmp_path / 'out'}"])
    (tmp_path / "in/1.parquet").write_bytes(b"")
    args.append(f"--data_dir={tmp_path / 'again'}")
    assert "in/1.parquet is not a sound parquet file" in fails(main, args, capsys)
    (tmp_path / "in/1.parquet").unlink()
    assert "1.parquet is no longer in" in fails(main, args, capsys)
    progress = tmp_path / "again/hub.part/progress.json"
    good = progress.read_text(encoding="utf-8")
    for names, words in (
        ([[1], 2], "progress.json is damaged (names[0] is a list, not of type str): remove"),
        (["../0.parquet"], "../0.parquet is no longer in"),
    ):
        changed = json.loads(good)
        changed["position"].update(names=names, file=0)
        progress.write_text(json.dumps(changed))
        assert words in fails(main, args, capsys)
    progress.write_text(good)
    for i in (1, 2):
        (tmp_path / f"in/{i}.parquet").write_bytes(server.files[FILES[i]])
    (tmp_path / "in/3.parquet").write_bytes(server.files[FILES[0]])
    main(args)
    assert content(tmp_path / "again") == content(tmp_path / "out")


def test_other_data_sets_are_not_overwritten(server, tmp_path, capsys):
    write_dataset([("train", "text"), ("val", "more")], tmp_path / "out", "byte")
    before = content(tmp_path / "out")
    assert "holds a data set with other settings" in fails(
        main, arguments(server, tmp_path / "out"), capsys
    )
    (tmp_path / "out/meta.json").write_text(
        before["meta.json"].decode().replace('"byte"', '"gpt2"')
    )
    assert "tokenizer 'gpt2', not 'byte'" in fails(
        main, arguments(server, tmp_path / "out"), capsys
    )
    before["meta.json"] = (tmp_path / "out/meta.json").read_bytes()
    assert content(tmp_path / "out") == before and not server.asked
    main(arguments(server, tmp_path / "out", "--overwrite=True"))
    assert "train.bin" not in content(tmp_path / "out") and decoded(Dataset(tmp_path / "out").train)
    before = content(tmp_path / "out")
    assert "with other settings" in fails(
        main, arguments(server, tmp_path / "out", "--max_tokens=99"), capsys
    )
    assert before == content(tmp_path / "out")
    (tmp_path / "out/val.bin").write_bytes(b"")  # the same command replaces a damaged set
    main(arguments(server, tmp_path / "out"))
    assert before == content(tmp_path / "out")


def test_an_unfinished_data_set_of_other_settings_is_kept(server, tmp_path, capsys):
    server.plan = {FILES[1]: [(404,)]}
    assert "0001.parquet answers 404" in fails(main, arguments(server, tmp_path / "out"), capsys)
    part = content(tmp_path / "out/hub.part")
    assert "an unfinished data set with other settings" in fails(
        main, arguments(server, tmp_path / "out", "--column=id"), capsys
    )
    assert part == content(tmp_path / "out/hub.part")
    (tmp_path / "out/hub.part/train_00000.bin").write_bytes(b"")
    main(arguments(server, tmp_path / "out", "--overwrite=True", "--max_tokens=9000"))
    assert Dataset(tmp_path / "out").meta["source"]["max_tokens"] == 9000


def test_damaged_progress(server, tmp_path, capsys):
    server.plan = {FILES[1]: [(404,)]}
    fails(main, arguments(server, tmp_path / "out"), capsys)
    for file in (tmp_path / "out/hub.part").glob("train_*.bin"):
        file.write_bytes(b"")
    assert f"remove {tmp_path / 'out/hub.part'} to begin again" in fails(
        main, arguments(server, tmp_path / "out"), capsys
    )
    progress = tmp_path / "out/hub.part/progress.json"
    good = json.loads(progress.read_text(encoding="utf-8"))
    damaged = ["{", "[]", "{}", "null", "[" * 10**5]
    for key, value in (
        ("names", ["../../../etc/passwd"]),
        ("names", "0000.parquet"),
        ("names", [".."]),
        ("folder", "../.."),
        ("file", -1),
        ("file", 4),
        ("rows", "0"),
        ("rows", 0.5),
        ("else", 1),
    ):
        damaged.append(json.dumps(dict(good, position=dict(good["position"], **{key: value}))))
    damaged.append(json.dumps(dict(good, about=dict(good["about"], commit="../main"))))
    entry = dict(good["splits"]["val"][0], name="../val.bin")
    damaged.append(json.dumps(dict(good, splits=dict(good["splits"], val=[entry]))))
    entry = dict(entry, name="val.bin", tokens=-1)
    damaged.append(json.dumps(dict(good, splits=dict(good["splits"], val=[entry]))))
    for text in damaged:
        progress.write_text(text)
        error = fails(main, arguments(server, tmp_path / "out"), capsys)
        assert "progress.json is damaged" in error and ": remove" in error


@pytest.mark.parametrize("name", ["pyarrow", "huggingface_hub"])
def test_without_a_package(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow", sys)  # as if it were installed
    monkeypatch.setitem(sys.modules, name, None)
    error = fails(main, ["--tokenizer=byte", f"--data_dir={tmp_path / 'out'}"], capsys)
    assert f"{name} is not installed: pip install pyarrow huggingface_hub" in error


def test_a_text_on_which_a_tokenizer_panics_is_named():
    """In a batch, the panic ended the run with a traceback."""
    class PanicException(BaseException):
        pass

    def encode(text):
        if text == "bad":
            raise PanicException("stack overflow")
        return [len(text)]

    def encode_batch(texts):
        return [encode(text) for text in texts]
    encoding = SimpleNamespace(encode_ordinary=encode, encode_ordinary_batch=encode_batch)
    assert hub.encode(["a", "bcd"], encoding) == [[1], [3]]
    with pytest.raises(UserError, match="cannot read a text of 3 characters"):
        hub.encode(["a", "bad"], encoding)


def test_tokenizer_files_tokenize_batches_as_they_do_texts(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    from nanogqa.tokenizer import HuggingFaceTokenizer

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts(200),
        tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    parquet(tmp_path / "x.parquet", texts(400))
    args = [
        f"--tokenizer={tmp_path}",
        f"--input={tmp_path}/x.parquet",
        f"--data_dir={tmp_path}/out",
        "--val_fraction=0.1",
    ]
    main(args)
    encoding, train = HuggingFaceTokenizer(tmp_path), Dataset(tmp_path / "out").train
    want = []
    for text in texts(400):
        if not in_val(text, 0.1):
            want += [*encoding.encode_ordinary(text), encoding.eot_token]
    assert train.windows([0], train.n_tokens)[0].tolist() == want
    assert (tmp_path / "out/tokenizer.json").exists()

    tokenizer.add_tokens(["eto"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    changed = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    assert "pass another --data_dir, or --overwrite=True" in fails(main, args, capsys)
    main([*args, "--overwrite=True"])
    assert (tmp_path / "out/tokenizer.json").read_text(encoding="utf-8") == changed


# -- hostile files and servers ---------------------------------------------------------------------

STRANGE = [
    None, True, -1, 0, 2, 2**61, 10**30, 1e308, 0.5, "", "x", "\ud800", "a\0b", "a\nb", "9" * 5000,
    "../../outside", "/etc/passwd", "..", "meta.json", "progress.json", ".lock", "val.bin",
    "train_00000.bin", "file:///etc/passwd", [], {}, [None], [[]], {"name": "val.bin"},
]  # fmt: skip


def places(value, found):
    """Appends every (container, key) inside value to found."""
    keys = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        found.append((value, key))
        places(value[key], found)
    return found


def damaged(content, rng):
    """content as JSON text with one to three things changed at random."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.choice([1, 1, 2, 3])):
        container, key = rng.choice(places(content, []))
        kind = rng.choice(["swap", "swap", "swap", "delete", "nest", "long", "double", "near"])
        if kind == "delete":
            del container[key]
        elif kind == "nest":
            for _ in range(rng.choice([3, 400])):
                container[key] = rng.choice([[container[key]], {"a": container[key]}])
        elif kind == "long":
            container[key] = rng.choice([str(container[key]) * 1000, [container[key]] * 1000])
        elif kind == "double" and isinstance(container, list):
            container.insert(key, container[key])
        elif kind == "near" and type(container[key]) is int:
            container[key] += rng.choice([-1, 1, 1000])
        else:
            container[key] = copy.deepcopy(rng.choice(STRANGE))
        if kind in ("nest", "long") or not places(content, []):
            break
    text = json.dumps(content)
    if rng.random() < 0.1:
        return text.replace('"tokens": ', '"tokens": 1, "tokens": ')  # the same key twice
    return text


@pytest.fixture
def tried(tmp_path, capsys, monkeypatch):
    """A function that runs main on a copy of a folder; main may end with 0, or with 2 and one line.

    What is beside the copy must not change.
    """
    monkeypatch.setattr(os, "fsync", lambda file: None)  # takes most of the time
    world = tmp_path / "world"
    (world / "outside").mkdir(parents=True)
    for name in ("val.bin", "train_00000.bin", "meta.json", "outside/val.bin"):
        (world / name).write_bytes(b"precious" * 10**4)
    before = content(world)

    def run(folder, change, args):
        shutil.copytree(folder, world / "data/set")
        change(world / "data/set")
        capsys.readouterr()
        status = 0
        try:
            main([*args, f"--data_dir={world / 'data/set'}"])
        except SystemExit as exit:
            status = exit.code
        error = capsys.readouterr().err
        if status:
            assert status == 2 and len(error.splitlines()) == 1 and len(error) < 1000, error
            assert "Traceback" not in error
        else:
            Dataset(world / "data/set")
        shutil.rmtree(world / "data")
        assert content(world) == before
        return status

    return run


def unfinished(tmp_path):
    """A folder with hub.part, the arguments that finish it, and a finished folder."""
    (tmp_path / "in").mkdir()
    good = parquet(tmp_path / "in/a.parquet", texts(60))
    (tmp_path / "in/b.parquet").write_bytes(b"no parquet")
    args = ["--tokenizer=byte", "--tokens_per_file=600", "--val_fraction=0.2"]
    args.append(f"--input={tmp_path / 'in'}")
    with pytest.raises(SystemExit):
        main([*args, f"--data_dir={tmp_path / 'begun'}"])
    (tmp_path / "in/b.parquet").write_bytes(good)
    main([*args, f"--data_dir={tmp_path / 'done'}"])
    return tmp_path / "begun", tmp_path / "done", args


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_unfinished_data_set_of_local_files_that_changed(tmp_path, overwrite):
    """With --overwrite=True it was continued, so that rows of the old files stayed before those of the new ones."""
    begun, done, args = unfinished(tmp_path)
    parquet(tmp_path / "in/a.parquet", texts(60)[::-1])
    more = ["--overwrite=True"] if overwrite else []
    main([*args, f"--data_dir={begun}", *more])
    main([*args, f"--data_dir={tmp_path / 'fresh'}"])
    assert (content(begun) == content(tmp_path / "fresh")) == overwrite
    assert (content(begun) == content(done)) == (not overwrite)


def test_damaged_json_files_write_nothing_elsewhere(tmp_path, tried):
    """210 damaged progress.json and meta.json, names that lead elsewhere among them."""
    begun, done, args = unfinished(tmp_path)
    seen = []
    for seed in range(210):
        rng = random.Random(seed)
        folder, name, more = begun, "hub.part/progress.json", []
        if seed % 2:
            folder, name = done, "meta.json"
            more = rng.choice([[], ["--overwrite=True"], ["--val_fraction=0.3"]])
        text = damaged(json.loads((folder / name).read_text(encoding="utf-8")), rng)

        def change(copy, name=name, text=text):
            (copy / name).write_text(text)

        seen.append(tried(folder, change, [*args, *more]))
    assert seen.count(0) > 40 and seen.count(2) > 40


@pytest.mark.parametrize(
    "files,key,value",
    [
        ("train", "name", "../../../val.bin"),
        ("train", "name", "/elsewhere/val.bin"),
        ("train", "name", "progress.json"),
        ("train", "name", "train_00001.bin"),
        ("train", "tokens", 10**6),
        ("train", "tokens", 1),
        ("val", "name", "train_00000.bin"),
        ("val", "name", "meta.json"),
        ("val", "tokens", 2**61),
    ],
)
def test_progress_lists_what_a_writer_would_write(tmp_path, tried, files, key, value):
    begun, _, args = unfinished(tmp_path)

    def change(copy):
        path = copy / "hub.part/progress.json"
        progress = json.loads(path.read_text(encoding="utf-8"))
        progress["splits"][files][0][key] = value
        path.write_text(json.dumps(progress))

    assert tried(begun, lambda copy: None, args) == 0
    assert tried(begun, change, args) == 2


def test_progress_beyond_the_end_of_a_file(tmp_path, tried):
    """Rows that a file does not have were skipped silently, and with them the whole file."""
    begun, _, args = unfinished(tmp_path)

    def change(copy):
        path = copy / "hub.part/progress.json"
        progress = json.loads(path.read_text(encoding="utf-8"))
        progress["position"]["rows"] = 61
        path.write_text(json.dumps(progress))

    assert tried(begun, change, args) == 2


@pytest.mark.parametrize("name", [".", "val.bin", "train_00000.bin", "progress.json.part", "x"])
def test_links_are_not_followed(tmp_path, tried, name):
    begun, _, args = unfinished(tmp_path)

    def change(copy):
        path = copy / "hub.part" / name
        target = copy.parents[1] / "outside"
        if name == ".":
            path.rename(copy.parents[0] / "moved")
            path.symlink_to(copy.parents[0] / "moved")
            return
        path.unlink(missing_ok=True)
        if name != "x":
            target = target / "val.bin"
        path.symlink_to(target)

    assert tried(begun, change, args) == 2


@pytest.mark.parametrize("name", ["meta.json", "meta.json.part", "val.bin", "train_00000.bin"])
def test_links_in_data_dir_are_replaced(tmp_path, tried, name):
    _, done, args = unfinished(tmp_path)

    def change(copy):
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to(copy.parents[1] / "outside/val.bin")

    assert tried(done, change, [*args, "--overwrite=True"]) == 0


def test_parquet_files_of_unfinished_data_sets_are_not_read(tmp_path):
    begun, done, args = unfinished(tmp_path)
    want = content(done)
    shutil.copytree(begun / "hub.part", tmp_path / "in/hub.part")
    shutil.copy(tmp_path / "in/a.parquet", tmp_path / "in/hub.part/00000.parquet")
    main([*args, f"--data_dir={tmp_path / 'in'}"])
    assert {name: (tmp_path / "in" / name).read_bytes() for name in want} == want


def test_data_of_a_refused_run_is_not_left(server, tmp_path, capsys):
    """A run that never wrote a document leaves nothing; one that can go on keeps what it has."""
    for args in (["--column=id"], ["--repo=other/text"], ["--endpoint=http://[::1"]):
        fails(main, arguments(server, tmp_path / "new/out", *args), capsys)
        assert not (tmp_path / "new").exists()
    server.plan = {FILES[0]: [b"no", b"parquet"]}
    fails(main, arguments(server, tmp_path / "new/out"), capsys)
    assert not (tmp_path / "new").exists()
    server.plan = {f"HEAD {FILES[0]}": [(503,)] * 100}
    fails(main, arguments(server, tmp_path / "new/out"), capsys)
    assert (tmp_path / "new/out/hub.part/progress.json").exists()


@pytest.mark.parametrize("address", ["http://[::1", "file:///etc/passwd", "https://" + "ü" * 70, "x"])
def test_addresses_of_the_environment(tmp_path, address):
    """huggingface_hub reads HF_ENDPOINT when it is imported, and failed there."""
    pytest.importorskip("huggingface_hub")
    done = subprocess.run(
        [sys.executable, "data/hub/prepare.py", "--tokenizer=byte", f"--data_dir={tmp_path}/out"],
        cwd=ROOT, env=dict(os.environ, HF_ENDPOINT=address), capture_output=True, text=True,
        timeout=100,
    )  # fmt: skip
    assert done.returncode == 2 and "is not the address of a Hub: give" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


class Rude(http.server.BaseHTTPRequestHandler):
    """Answers with what server.head and server.body give, for as long as the client reads."""

    timeout = 60
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.n_asked += 1
        self.wfile.write(b"HTTP/1.1 " + self.server.head + b"\r\n\r\n")
        with contextlib.suppress(OSError):
            for part in self.server.body():
                self.wfile.write(part)
                self.wfile.flush()
        self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def rude(monkeypatch, server):
    """A server that keeps no rule. Limits of time are a hundred times shorter."""
    rude = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Rude)
    rude.daemon_threads = True
    rude.url = f"http://127.0.0.1:{rude.server_address[1]}"
    rude.n_asked = 0
    rude.over = threading.Event()
    monkeypatch.setattr(hub, "TIMEOUT", 0.1)
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    threading.Thread(target=rude.serve_forever, args=(0.01,), daemon=True).start()
    yield rude
    rude.over.set()
    rude.shutdown()
    rude.server_close()


def endless(part, seconds=0.0):
    def body(over):
        while not over.wait(seconds):
            yield part

    return body


OK = b"200 OK\r\nContent-Type: application/json"


@pytest.mark.parametrize(
    "head,body,words",
    [
        (OK, endless(b"[" * 2**20), "where a short answer is expected"),
        (OK + b"\r\nContent-Length: 99999999999", endless(b"[" * 2**20), "a short answer is"),
        (OK + b"\r\nContent-Encoding: gzip", "bomb", "a short answer is expected"),
        (OK, endless(b"[", 0.03), "in 0.2 s, 6 times in a row)"),
        (OK, endless(b"", 0.03), "6 times in a row): run the same command later"),
        (OK + b"\r\nContent-Length: many", endless(b"x"), "times in a row): run the same"),
        (OK + b"\r\nContent-Length: -1", endless(b"x"), "times in a row): run the same"),
        (b"302 Found\r\nLocation: /", lambda over: [], "times in a row): run the same"),
        (b"302 Found\r\nLocation: http://[::1", lambda over: [], "times in a row): run the same"),
        (b"302 Found\r\nLocation: file:///etc/passwd", lambda over: [], "times in a row): run"),
    ],
    ids=["endless", "long", "bomb", "drip", "silence", "many", "-1", "loop", "[", "file"],
)
def test_servers_that_keep_no_rule(rude, tmp_path, capsys, head, body, words):
    if body == "bomb":
        import zlib

        pack = zlib.compressobj(wbits=31)
        packed = pack.compress(b"[" * 2**26) + pack.flush()
        rude.body = lambda: [packed]
    else:
        rude.body = lambda: body(rude.over)
    rude.head = head
    start = time.monotonic()
    error = fails(main, arguments(rude, tmp_path / "out"), capsys)
    assert words in error and len(error) < 1000 and not (tmp_path / "out").exists()
    assert time.monotonic() - start < 10


def test_a_list_without_an_end(server, tmp_path, capsys, monkeypatch):
    """Each page names the next one."""
    monkeypatch.setattr(hub, "MOST_PAGES", 20)
    monkeypatch.setattr(Handler, "end_headers", with_next_page)
    server.files[LIST] = b"[]"
    assert "answers: check --repo" in fails(main, arguments(server, tmp_path / "out"), capsys)
    assert 20 <= len(server.asked) < 30 and not (tmp_path / "out").exists()


def with_next_page(handler):
    handler.send_header("Link", f'<{handler.server.url}{LIST}>; rel="next"')
    http.server.BaseHTTPRequestHandler.end_headers(handler)


@pytest.mark.parametrize(
    "answer", [{"a": 1}, {"type": "file"}, [{"type": "file"}], [{"path": 3}], [None], "text", 1.5]
)
def test_lists_of_other_kinds(server, tmp_path, capsys, answer):
    server.files[LIST] = json.dumps(answer).encode()
    error = fails(main, arguments(server, tmp_path / "out"), capsys)
    assert "answers 'some/text' differently from the Hub" in error
    assert not (tmp_path / "out").exists()


def test_a_download_that_drips_is_given_up(server, tmp_path, capsys, monkeypatch):
    """A connection that is never silent, and never done, is tried again a few times."""
    monkeypatch.setattr(hub, "PATIENCE", 0.05)

    def drip(handler):
        handler.server.asked.append(("GET", None))
        handler.answer(FILES[0], None, server.files[FILES[0]], 0)
        with contextlib.suppress(OSError):
            for byte in server.files[FILES[0]]:
                handler.wfile.write(bytes([byte]))
                threading.Event().wait(0.01)

    get = Handler.do_GET
    monkeypatch.setattr(
        Handler, "do_GET", lambda self: drip(self) if "resolve" in self.path else get(self)
    )
    error = fails(main, arguments(server, tmp_path / "out"), capsys)
    assert "in 0.05 s, 6 times in a row): run the same command later" in error
    assert server.asked.count(("GET", None)) == hub.RETRIES
    monkeypatch.setattr(Handler, "do_GET", get)
    monkeypatch.setattr(hub, "PATIENCE", 60)
    main(arguments(server, tmp_path / "out"))


@pytest.mark.parametrize("size", ["many", "9" * 30, "-1", "1e3"])
def test_parquet_files_of_an_odd_length(server, tmp_path, capsys, monkeypatch, size):
    def send_header(handler, key, value):
        if key == "Content-Length" and "resolve" in handler.path:
            value = size
        http.server.BaseHTTPRequestHandler.send_header(handler, key, value)

    monkeypatch.setattr(Handler, "send_header", send_header)
    error = fails(main, arguments(server, tmp_path / "out"), capsys)
    assert server.url in error and len(error) < 1000


def test_waiting_times_of_a_server_are_bounded(server, tmp_path, monkeypatch):
    """A busy server may ask for some minutes, and not for a day."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)

    for seconds, expected in ((7, 8), (86400, 1)):
        waits.clear()
        asked = []

        def answer(self, path, how, content, start, asked=asked, seconds=seconds, real=Handler.answer):
            if path == LIST and not asked:
                asked.append(path)
                self.send_response(429)
                self.send_header("Retry-After", str(seconds))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return False
            return real(self, path, how, content, start)

        with monkeypatch.context() as patch:
            patch.setattr(Handler, "answer", answer)
            main(arguments(server, tmp_path / str(seconds)))
        assert waits == [expected]


# -- reading ---------------------------------------------------------------------------------------


def make(folder, sizes):
    """A data set whose train split is the parts in folder of these sizes, and val the last one."""
    names = [f"train_{i:05d}.bin" for i in range(len(sizes))]
    train = [dict(name=name, tokens=n, bytes=n + 1) for name, n in zip(names, sizes, strict=True)]
    os.link(folder / names[-1], folder / "val.bin")
    val = [dict(train[-1], name="val.bin")]
    meta = dict(
        tokenizer="byte",
        vocab_size=257,
        dtype="uint16",
        sha256="0" * 64,
        splits=dict(train=train, val=val),
    )
    (folder / "meta.json").write_text(json.dumps(meta))
    return Dataset(folder)


def test_windows_of_many_files_are_those_of_one(tmp_path):
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(0, 60, 300).tolist(), 0, 5]
    whole = rng.integers(0, 257, sum(sizes)).astype("<u2")
    for i, end in enumerate(np.cumsum(sizes)):
        whole[end - sizes[i] : end].tofile(tmp_path / f"train_{i:05d}.bin")
    split = make(tmp_path, sizes).train
    for length in (1, 2, 33, 500, len(whole)):
        starts = rng.integers(0, len(whole) - length + 1, 50)
        assert (
            split.windows(starts, length)
            == np.stack([whole[start : start + length] for start in starts])
        ).all()
    with pytest.raises(IndexError):
        split.windows([len(whole) - 3], 4)


def test_a_file_that_shrinks_while_it_is_used(tmp_path):
    (tmp_path / "train_00000.bin").write_bytes(bytes(200))
    split = make(tmp_path, [100]).train
    os.truncate(tmp_path / "train_00000.bin", 100)
    with pytest.raises(UserError, match="train_00000.bin has become shorter"):
        split.windows([40], 20)


def test_opening_checks_a_bounded_number_of_tokens(tmp_path, monkeypatch):
    from nanogqa import dataloader

    monkeypatch.setattr(dataloader, "SCANNED", 100)
    for i in range(10):
        np.full(30, 7, "<u2").tofile(tmp_path / f"train_{i:05d}.bin")
    seen = []
    monkeypatch.setattr(dataloader.Split, "check_ids", lambda self, ids: seen.append(len(ids)) or ids)
    make(tmp_path, [30] * 10)
    assert seen == [30, 30, 30, 10, 30]


SPARSE = """
import re, sys
from nanogqa import dataloader
def peak():  # in kB, of this process alone: getrusage() starts from the parent's peak
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
def read():  # in MB, from files
    return int(re.search(r"rchar: (\\d+)", open("/proc/self/io").read())[1]) / 1e6
before, read_before = peak(), read()
data = dataloader.Dataset(sys.argv[1])
opened = read() - read_before
for sequence in range(0, 400, 8):
    x, y = dataloader.train_batch(data.train, 1, sequence, 8, 1024)
    assert x.shape == y.shape == (8, 1024) and not x.any()
starts = dataloader.val_windows(data.val, 1024, 64 * 1024)
for i in range(0, len(starts), 8):
    dataloader.val_batch(data.val, starts[i:i + 8], 8, 1024)
end = data.train.windows([data.train.n_tokens - 2], 2)[0].tolist()
print(opened, (peak() - before) / 1024, *end)
"""


def test_a_file_of_20_gb_is_read_in_small_parts(tmp_path):
    """A sparse file, with only its last token written. Its own process adds at most 300 MB."""
    n = 10**10
    if not os.path.exists("/proc/self/io"):
        pytest.skip("Linux does not count here what a process reads")
    try:
        with open(tmp_path / "train_00000.bin", "wb") as file:
            file.seek(2 * n - 2)
            file.write(b"\x07\x00")
    except OSError:
        pytest.skip("no file of 20 GB here")
    make(tmp_path, [n])
    out = subprocess.run(
        [sys.executable, "-c", SPARSE, tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    ).stdout
    opened, grown, *end = map(float, out.split())
    assert 0 < opened < 100 and grown < 300 and end == [0, 7], out


def test_a_thousand_files_open_at_once(tmp_path):
    for i in range(3000):
        (tmp_path / f"train_{i:05d}.bin").write_bytes(bytes(128))
    start = time.process_time()
    split = make(tmp_path, [64] * 3000).train
    assert time.process_time() - start < 3 and split.n_tokens == 3000 * 64


def test_a_folder_that_cannot_be_written(server, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "choose another --data_dir" in fails(main, arguments(server, tmp_path / "file/out"), capsys)

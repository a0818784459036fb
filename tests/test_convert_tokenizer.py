"""Tokenizers in and out of Hugging Face folders: AutoTokenizer reads our ids, whatever its class."""

import json
import shutil
from types import SimpleNamespace

import pytest
import tiktoken
import test_convert
import torch
from conftest import load, toy_model
from test_convert import (
    TINY,
    command,
    make_hf,
    save,
    sentencepiece_like,
    tokenizer_folder,
)
from test_inputs import fails

import convert
import sample
import train
from nanogqa import hf_tokenizer
from nanogqa.tokenizer import HuggingFaceTokenizer, Text, check_strings, get_tokenizer
from nanogqa.writer import write_dataset

transformers, toy_bpe = test_convert.transformers, test_convert.toy_bpe  # fixtures


@pytest.fixture
def tokenizers():
    return pytest.importorskip("tokenizers")


def llama(transformers, folder, monkeypatch, **about):
    """A tiny Llama with the tokenizer of sentencepiece_like; about is its tokenizer_config.json."""
    import tokenizers

    monkeypatch.setitem(TINY, "vocab_size", 270)
    make_hf(transformers, folder, "llama2")
    sentencepiece_like(tokenizers).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))


def from_hf(tmp_path, name="hf", to="ours"):
    convert.main(command("from_hf", hf_dir=tmp_path / name, out_dir=tmp_path / to))
    return load(tmp_path / to)["tokenizer"]


def to_hf(source, folder):
    convert.main(command("to_hf", out_dir=source, hf_dir=folder))
    return folder


def same_ids(transformers, folder, encoding, **options):
    """AutoTokenizer gives the ids of encoding for all check strings."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder, **options)
    for text in check_strings(encoding):
        assert theirs(text)["input_ids"] == encoding.encode(text, allowed_special="all"), text


# -- exports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["byte", "gpt2", "cl100k_base"])
def test_transformers_reads_a_qwen2_export_as_ours(transformers, toy_bpe, tmp_path, name):
    """Version 5 replaces the tokenizer of every folder whose model_type is qwen2 by its own."""
    model = toy_model(n_kv_head=2, vocab_size=350, qk_norm=False, qkv_bias=True)
    hf = to_hf(save(model, tmp_path / "ours", name), tmp_path / "hf")
    assert json.loads((hf / "config.json").read_text(encoding="utf-8"))["model_type"] == "qwen2"
    for trust in (None, False, True):
        same_ids(transformers, hf, get_tokenizer(name), trust_remote_code=trust)
    generator = transformers.pipeline("text-generation", model=str(hf), device="cpu")
    assert generator.tokenizer("in 2026")["input_ids"] == get_tokenizer(name).encode("in 2026")
    assert from_hf(tmp_path, to="back") == name


def test_a_copied_tokenizer_of_qwen2_is_read_as_ours(transformers, tokenizers, tmp_path):
    """With keys in its tokenizer_config.json that would change what the tokenizer.json says."""
    source = tokenizer_folder(tokenizers, tmp_path / "ours")
    edit(
        source / "tokenizer_config.json",
        tokenizer_class="LlamaTokenizer",
        add_bos_token=False,
        add_eos_token=True,
        add_prefix_space=False,
        chat_template="{{ messages }}",
    )
    encoding = HuggingFaceTokenizer(source)
    for i, changes in enumerate((dict(qkv_bias=True), {}, dict(attention="mla", qk_norm=True))):
        model = toy_model(vocab_size=270, **(dict(qk_norm=False) | changes))
        hf = to_hf(save(model, source, encoding.name), tmp_path / f"hf{i}")
        same_ids(transformers, hf, encoding)
        assert (hf / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
        about = json.loads((hf / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert about["chat_template"] == "{{ messages }}" and "add_eos_token" not in about


@pytest.mark.parametrize("name", ["byte", "file"])
def test_every_exported_tokenizer_is_checked(
    transformers, tokenizers, tmp_path, capsys, monkeypatch, name
):
    if name == "file":
        name = HuggingFaceTokenizer(tokenizer_folder(tokenizers, tmp_path / "ours")).name
    source = save(toy_model(n_kv_head=2, vocab_size=270), tmp_path / "ours", name)
    read = transformers.AutoTokenizer.from_pretrained

    def other(*args, **options):
        """As a version of transformers would that splits digits."""
        tokenizer = read(*args, **options)
        tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("2026", "2 0 2 6")
        return tokenizer

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", other)
    error = fails(convert.main, command("to_hf", out_dir=source, hf_dir=tmp_path / "hf"), capsys)
    assert "differently from this program" in error and not list(tmp_path.glob("hf*"))


# -- imports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "about",
    [
        dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>"),
        dict(tokenizer_class="LlamaTokenizerFast", add_bos_token=False),
        dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>"),
        dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>", add_eos_token=True),
    ],
    ids=["llama", "llama without bos", "fast", "fast with eos"],
)
def test_from_hf_compares_with_autotokenizer(transformers, tmp_path, capsys, monkeypatch, about):
    """transformers 5 builds another pre-tokenizer for LlamaTokenizer than its tokenizer.json says.

    The file is followed, in exports too; a difference is a warning with an example.
    """
    import tokenizers

    hf = llama(transformers, tmp_path / "hf", monkeypatch, **about)
    raw = tokenizers.Tokenizer.from_file(str(hf / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(hf)
    differ = []
    for text in check_strings(SimpleNamespace(special_tokens_set={"<s>", "</s>"})):
        if theirs(text)["input_ids"] != raw.encode(text).ids:
            differ.append(text)
    name = from_hf(tmp_path)
    printed = capsys.readouterr()
    assert ("gives the same ids" in printed.out) == (not differ)
    assert ("this program and its exports follow tokenizer.json" in printed.err) == bool(differ)
    if differ:
        assert repr(differ[0])[:20] in printed.err
    if transformers.__version__ > "5" and about["tokenizer_class"] == "LlamaTokenizer":
        assert len(differ) > 5
    ours = get_tokenizer(name, tmp_path / "ours")
    for text in check_strings(SimpleNamespace(special_tokens_set={"<s>", "</s>"})):
        assert ours.encode(text) == raw.encode(text).ids
    same_ids(transformers, to_hf(tmp_path / "ours", tmp_path / "again"), ours)


def test_a_chat_template_in_a_file_of_its_own(transformers, tmp_path, monkeypatch):
    """transformers 5 writes it beside tokenizer_config.json, and reads it first: it was lost."""
    hf = llama(transformers, tmp_path / "hf", monkeypatch, tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>")
    (hf / "chat_template.jinja").write_text("{{ messages }}")
    from_hf(tmp_path)
    again = to_hf(tmp_path / "ours", tmp_path / "again")
    assert json.loads((again / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"] == "{{ messages }}"


def word_piece(tokenizers, decoder=True):
    vocab = {"[UNK]": 0, "</s>": 1}
    for token in ("the", "##n", "t", "##e", "##h", "x", "2", "##0", "a", "on"):
        vocab[token] = len(vocab)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if decoder:
        tokenizer.decoder = tokenizers.decoders.WordPiece()
    return tokenizer


def word_level(tokenizers):
    vocab = {"[UNK]": 0, "</s>": 1, "the": 2, "a": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


def suffixed(tokenizers):
    """BPE whose words end in </w>, as GPT-1 and CLIP have it."""
    letters = [chr(code) for code in range(33, 127)]
    vocab = {}
    for token in ["</s>", "[UNK]", *letters, *[letter + "</w>" for letter in letters]]:
        vocab[token] = len(vocab)
    model = tokenizers.models.BPE(vocab, [], unk_token="[UNK]", end_of_word_suffix="</w>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.decoder = tokenizers.decoders.BPEDecoder()
    return tokenizer


@pytest.mark.parametrize(
    "make,kind",
    [
        (word_piece, "WordPiece"),
        (lambda tokenizers: word_piece(tokenizers, decoder=False), "WordPiece"),
        (word_level, "WordLevel"),
        (suffixed, "BPE"),
    ],
    ids=["WordPiece", "no decoder", "WordLevel", "suffix"],
)
def test_what_cannot_be_decoded_token_by_token_is_refused(
    transformers, tokenizers, tmp_path, capsys, monkeypatch, make, kind
):
    hf = llama(transformers, tmp_path / "hf", monkeypatch, eos_token="</s>")
    make(tokenizers).save(str(hf / "tokenizer.json"))
    edit(hf / "config.json", eos_token_id=None)
    arguments = command("from_hf", hf_dir=hf, out_dir=tmp_path / "ours")
    error = fails(convert.main, arguments, capsys)
    assert f"of kind {kind} whose text cannot be decoded token by token" in error
    assert not list(tmp_path.glob("ours*"))


def test_tokenizers_of_language_models_are_decoded_token_by_token(tokenizers, tmp_path):
    """Unigram with Metaspace, and byte-level BPE: pieces of a text give what all give at once."""
    unigram = tokenizers.SentencePieceUnigramTokenizer()
    bpe = tokenizers.ByteLevelBPETokenizer()
    lines = ["the theatre there", "then 2026 or 12345", "  on and on"]
    unigram.train_from_iterator(
        lines, vocab_size=60, special_tokens=["</s>", "<unk>"], unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(
        lines, vocab_size=300, special_tokens=["</s>"], show_progress=False
    )
    for i, made in enumerate((unigram, bpe)):
        folder = tmp_path / str(i)
        folder.mkdir()
        made.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        encoding = HuggingFaceTokenizer(folder)
        pieces = map(encoding.decode_single_token_bytes, encoding.encode("the theatre on 2026"))
        assert b"".join(pieces).decode().strip() == "the theatre on 2026"


# -- what ends a text ------------------------------------------------------------------------------


def stopping(transformers, tmp_path, monkeypatch):
    """The name of an imported tokenizer: config.json has two ids of ends, another file one more."""
    hf = llama(transformers, tmp_path / "hf", monkeypatch, eos_token="</s>")
    edit(hf / "config.json", eos_token_id=[2, 260])
    edit(hf / "generation_config.json", eos_token_id=[260, 262])
    return from_hf(tmp_path)


def test_every_eos_token_id_ends_a_text(transformers, tmp_path, capsys, monkeypatch):
    encoding = get_tokenizer(stopping(transformers, tmp_path, monkeypatch), tmp_path / "ours")
    assert encoding.eot_token == 2 and encoding.stop_tokens == [2, 260, 262]
    for token in (2, 260, 262):
        text = Text(encoding)
        assert text.add(261) == "h" and text.add(token) == "" and text.done
        monkeypatch.setattr(
            sample, "sample_token", lambda logits, *args, **kw: torch.tensor([[token]])
        )
        capsys.readouterr()
        sample.main(command(out_dir=tmp_path / "ours", prompt="the", max_new_tokens=9, device="cpu"))
        assert capsys.readouterr().out == "the\n"


def test_every_eos_token_id_returns_in_an_export(transformers, tmp_path, monkeypatch):
    """Also after training on data that was prepared with the imported tokenizer."""
    stopping(transformers, tmp_path, monkeypatch)
    texts = [("train", "then the ten " * 60), ("val", "the then " * 30)]
    write_dataset(texts, tmp_path / "data", str(tmp_path / "ours"))
    train.main(
        command(
            init_from=tmp_path / "ours", out_dir=tmp_path / "tuned", dataset=tmp_path / "data",
            block_size=16, tokens_per_step=32, max_steps=1, device="cpu",
        )
    )  # fmt: skip
    for source in ("ours", "tuned"):
        hf = to_hf(tmp_path / source, tmp_path / f"{source}-hf")
        for name in ("config.json", "generation_config.json"):
            assert json.loads((hf / name).read_text(encoding="utf-8"))["eos_token_id"] == [2, 260, 262]
        from_hf(tmp_path, f"{source}-hf", f"{source}-back")
        back = HuggingFaceTokenizer(tmp_path / f"{source}-back")
        assert back.stop_tokens == [2, 260, 262] and back.bos_token == 1


@pytest.mark.parametrize("ids", [2, [2], [2, 2]], ids=str)
def test_one_eos_token_id_stays_one(transformers, tmp_path, monkeypatch, ids):
    hf = llama(transformers, tmp_path / "hf", monkeypatch, eos_token="<s>")
    edit(hf / "config.json", eos_token_id=ids)
    (hf / "generation_config.json").unlink()
    from_hf(tmp_path)
    again = to_hf(tmp_path / "ours", tmp_path / "again")
    assert json.loads((again / "config.json").read_text(encoding="utf-8"))["eos_token_id"] == 2


def test_a_missing_eos_names_the_folder_that_was_given(transformers, tmp_path, capsys, monkeypatch):
    hf = llama(transformers, tmp_path / "hf", monkeypatch)
    edit(hf / "config.json", eos_token_id=None)
    (hf / "generation_config.json").unlink()
    arguments = command("from_hf", hf_dir=hf, out_dir=tmp_path / "ours")
    assert f"{hf}/tokenizer_config.json names no eos_token" in fails(convert.main, arguments, capsys)


# -- the name of a tokenizer -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["byte", "gpt2", "o200k_base", "file"])
def test_a_folder_saved_again_keeps_its_tokenizers_name(
    transformers, tokenizers, toy_bpe, tmp_path, name
):
    """Version 5 adds a post-processor that does nothing, and sorts the file otherwise."""
    if name == "file":
        name = HuggingFaceTokenizer(tokenizer_folder(tokenizers, tmp_path / "ours")).name
    source = save(toy_model(n_kv_head=2, vocab_size=350), tmp_path / "ours", name)
    hf = to_hf(source, tmp_path / "hf")
    again = tmp_path / "saved again"
    transformers.AutoModelForCausalLM.from_pretrained(hf).save_pretrained(again)
    transformers.AutoTokenizer.from_pretrained(hf).save_pretrained(again)
    if transformers.__version__ > "5":
        assert (hf / "tokenizer.json").read_text(encoding="utf-8") != (again / "tokenizer.json").read_text(encoding="utf-8")
    assert from_hf(tmp_path, "saved again", "back") == name


def test_a_tokenizer_is_named_by_what_it_does(tokenizers, tmp_path):
    """Blanks in the file change nothing; one merge, token or normalizer less is another name."""
    folder = tokenizer_folder(tokenizers, tmp_path / "a")
    name = HuggingFaceTokenizer(folder).name
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=7))
    assert HuggingFaceTokenizer(folder).name == name
    model = content["model"]
    fewer = {token: i for token, i in model["vocab"].items() if token != "\u2581then"}
    for changes in (
        dict(model=model | dict(merges=model["merges"][1:])),
        dict(model=model | dict(vocab=fewer, merges=model["merges"][:-1])),
        dict(normalizer=content["normalizer"]["normalizers"][1]),
        dict(post_processor=None),
    ):
        (folder / "tokenizer.json").write_text(json.dumps(content | changes))
        assert HuggingFaceTokenizer(folder).name != name


def test_half_a_surrogate_pair_is_read_as_by_tiktoken(transformers, tmp_path, monkeypatch):
    """A prompt that is not UTF-8 has some; the tokenizers library ended in a traceback."""
    llama(transformers, tmp_path / "hf", monkeypatch, eos_token="</s>")
    encoding = HuggingFaceTokenizer(tmp_path / "hf")
    for text in ("a\ud800b", "\udcff"):
        seen = text.replace("\ud800", "\ufffd").replace("\udcff", "\ufffd")
        assert encoding.encode(text) == encoding.encode(seen)
        assert get_tokenizer("byte").encode(text) == get_tokenizer("byte").encode(seen)


def test_names_of_earlier_versions_are_read(transformers, tmp_path, monkeypatch):
    """They are the hash of the file. Data that is prepared today fits such a checkpoint."""
    llama(transformers, tmp_path / "hf", monkeypatch, eos_token="</s>")
    from_hf(tmp_path)
    old = HuggingFaceTokenizer(tmp_path / "ours").older_name
    state = load(tmp_path / "ours") | dict(tokenizer=old)
    torch.save(state, tmp_path / "ours/ckpt.pt")
    assert get_tokenizer(old, tmp_path / "ours").encode("the")
    texts = [("train", "then the ten " * 60), ("val", "the then " * 30)]
    write_dataset(texts, tmp_path / "data", str(tmp_path / "ours"))
    train.main(
        command(
            init_from=tmp_path / "ours", out_dir=tmp_path / "tuned", dataset=tmp_path / "data",
            block_size=16, tokens_per_step=32, max_steps=1, device="cpu",
        )
    )  # fmt: skip
    assert load(tmp_path / "tuned")["tokenizer"].startswith("tokenizer.json")


def test_a_tokenizer_beside_a_named_checkpoint_is_found(transformers, tmp_path, monkeypatch):
    """--out_dir may name a file such as ckpt_best.pt."""
    llama(transformers, tmp_path / "hf", monkeypatch, eos_token="</s>")
    from_hf(tmp_path)
    shutil.copy(tmp_path / "ours/ckpt.pt", tmp_path / "ours/ckpt_best.pt")
    hf = to_hf(tmp_path / "ours/ckpt_best.pt", tmp_path / "best")
    assert (hf / "tokenizer.json").exists()
    convert.main(
        command("pool", out_dir=tmp_path / "ours/ckpt_best.pt", n_kv_head=1, new_dir=tmp_path / "one")
    )
    assert (tmp_path / "one/tokenizer.json").exists()


def test_an_unchanged_tiktoken_encoding_alone_keeps_the_name(toy_bpe, tmp_path):
    """Other merges with the same vocabulary are another tokenizer."""
    pytest.importorskip("tokenizers")
    encoding = toy_bpe["gpt2"]
    hf_tokenizer.save(hf_tokenizer.hf_tokenizer(encoding), tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(eos_token="<|endoftext|>")))
    assert hf_tokenizer.is_tiktoken("gpt2", HuggingFaceTokenizer(tmp_path))
    assert not hf_tokenizer.is_tiktoken("byte", HuggingFaceTokenizer(tmp_path))
    assert not hf_tokenizer.is_tiktoken("cl100k_base", HuggingFaceTokenizer(tmp_path))
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"].reverse()
    content["model"]["ignore_merges"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert not hf_tokenizer.is_tiktoken("gpt2", HuggingFaceTokenizer(tmp_path))
    assert isinstance(get_tokenizer("byte"), tiktoken.Encoding)

"""Calibration data. The tokenizer here maps the word "w17" to the id 17, so tests know the ids of a text."""

import hashlib
import json
import socket

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_fp4.calibration import data
from hf_fp4.calibration.data import calibration_batches
from hf_fp4.config import DEFAULT_DATASET

WORDS = 60_000
BOS, EOS = WORDS, WORDS + 1


def make_tokenizer(*, words=WORDS, adds_bos=False, has_eos=True, unknown="w0"):
    vocab = {f"w{i}": i for i in range(words)} | {"<bos>": words, "<eos>": words + 1}
    inner = Tokenizer(models.WordLevel(vocab, unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", words)]
        )
    special = {"bos_token": "<bos>"} | ({"eos_token": "<eos>"} if has_eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=unknown, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def bos_tokenizer():
    return make_tokenizer(adds_bos=True)


def words(begin, end, separator=" "):
    return separator.join(f"w{i}" for i in range(begin, end))


def batches(dataset, tokenizer, *, n=4, length=8, **changes):
    options = {"batch_size": 4, "seed": 0, "vocab_size": WORDS + 2} | changes
    return calibration_batches(dataset, tokenizer, num_samples=n, sequence_length=length, **options)


def rows(*args, **kwargs):
    return torch.cat(batches(*args, **kwargs).batches)


def ids_of(*args, **kwargs):
    """Every id that was used, in ascending order."""
    return rows(*args, **kwargs).flatten().sort().values.tolist()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --- shape, order, determinism


def test_batches_have_the_asked_for_shape(tokenizer):
    result = batches([words(0, 1000)], tokenizer, n=10, length=16, batch_size=4)
    assert [tuple(batch.shape) for batch in result.batches] == [(4, 16), (4, 16), (2, 16)]
    assert all(batch.dtype == torch.int64 and batch.device.type == "cpu" for batch in result.batches)


def test_a_sequence_is_a_run_of_the_text_and_sequences_do_not_overlap(tokenizer):
    result = rows([words(0, 3000)], tokenizer, n=20, length=32)
    assert torch.equal(result - result[:, :1], torch.arange(32).expand(20, -1))
    assert len(set(result.flatten().tolist())) == 20 * 32


def test_the_same_seed_gives_the_same_ids_and_another_seed_others(tokenizer):
    text = [words(0, 5000)]
    first, again, other = (batches(text, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.cat(first.batches), torch.cat(again.batches))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_the_fingerprint_is_sha256_of_shape_and_ids(tokenizer):
    result = batches([words(0, 999)], tokenizer, n=6, length=5, batch_size=4)
    ids = np.concatenate([batch.numpy() for batch in result.batches]).astype("<i8")
    assert result.fingerprint == hashlib.sha256(b"[6, 5]" + ids.tobytes()).hexdigest()
    assert result.fingerprint == batches([words(0, 999)], tokenizer, n=6, length=5, batch_size=1).fingerprint
    assert result.description == "a list of 1 texts: 6 sequences of 5 tokens, seed 0"


def test_a_long_text_is_sampled_all_over_and_not_tokenized_whole(tokenizer, monkeypatch):
    tokenized = []
    real = data.tokenize
    monkeypatch.setattr(data, "tokenize", lambda *args: tokenized.append(real(*args)) or tokenized[-1])
    starts = rows([words(0, WORDS)], tokenizer, n=64, length=4)[:, 0]
    assert set((starts * 4 // WORDS).tolist()) == {0, 1, 2, 3}  # every quarter of the text
    assert 8 * 64 * 4 <= sum(map(len, tokenized)) < WORDS / 4


def test_many_short_documents_are_sampled_all_over_and_neighbours_stay_together(tokenizer):
    lines = [f"w{i}" for i in range(WORDS)]
    result = rows(datasets.Dataset.from_dict({"text": lines}), tokenizer, n=64, length=8)
    content = result[result != EOS].view(64, 4)
    assert set((content * 4 // WORDS).flatten().tolist()) == {0, 1, 2, 3}
    assert ((content[:, 1:] - content[:, :-1]) == 1).float().mean() > 0.9


def test_text_that_is_just_enough_is_used_whole(tokenizer):
    assert ids_of([words(0, 31)], tokenizer, n=4, length=8) == [*range(31), EOS]


# --- BOS and EOS


def test_each_sequence_begins_with_bos_if_the_tokenizer_adds_one(bos_tokenizer):
    result = rows([words(0, 500), words(500, 900)], bos_tokenizer, n=8, length=16)
    assert (result[:, 0] == BOS).all()
    assert not (result[:, 1:] == BOS).any()


def test_eos_follows_each_document_and_nothing_else(tokenizer):
    result = rows([words(0, 7), words(10, 17)], tokenizer, n=1, length=16)
    assert result.tolist() == [[*range(7), EOS, *range(10, 17), EOS]]


def test_no_eos_where_the_tokenizer_has_none():
    result = rows([words(0, 4), words(10, 14)], make_tokenizer(has_eos=False), n=1)
    assert result.tolist() == [[0, 1, 2, 3, 10, 11, 12, 13]]


def test_a_long_document_is_cut_without_losing_or_changing_a_word(tokenizer):
    text = words(0, 20_000, "\n")
    pieces = data._fragments(text)
    assert len(pieces) > 5 and "".join(pieces) == text
    assert data.tokenize([text], tokenizer).tolist() == [*range(20_000), EOS]
    assert "".join(data._fragments("x" * 50_000)) == "x" * 50_000


def test_a_prefix_of_two_tokens(tokenizer):
    class TwoInFront:
        bos_token_id, eos_token_id, all_special_ids = None, None, [7, 8]

        def __len__(self):
            return 9

        def __call__(self, text, add_special_tokens=True, **kwargs):
            def encode(one):
                return ([7, 8] if add_special_tokens else []) + [int(word) for word in one.split()]

            return {"input_ids": encode("3") if text == "a" else [encode(one) for one in text]}

    assert data.sequence_prefix(TwoInFront()) == [7, 8]
    assert rows(["1 2 3"], TwoInFront(), n=1, length=5).tolist() == [[7, 8, 1, 2, 3]]
    assert data.sequence_prefix(tokenizer) == []


# --- kinds of dataset


@pytest.mark.parametrize("kind", ["list", "tuple", "dataset", "iterable", "rows", "column", "other name"])
def test_texts(kind, tokenizer):
    texts = [words(i * 10, i * 10 + 10) for i in range(40)]
    table = datasets.Dataset.from_dict({"text": texts, "url": ["u"] * 40})
    dataset = {
        "list": texts,
        "tuple": tuple(texts),
        "dataset": table,
        "iterable": table.to_iterable_dataset(),
        "rows": [{"text": text, "n": 1} for text in texts],
        "column": table["text"],
        "other name": datasets.Dataset.from_dict({"content": texts, "n": [1] * 40}),
    }[kind]
    result = rows(dataset, tokenizer, n=5, length=11, vocab_size=WORDS + 2)
    content = result[result != EOS]
    assert content.max() < 400
    assert len(set(content.tolist())) == len(content) >= 50


def test_a_stream_is_read_no_further_than_needed(tokenizer):
    read = []

    def generate():
        for i in range(100_000):
            read.append(i)
            yield {"text": words(i % 1000, i % 1000 + 10)}

    batches(datasets.IterableDataset.from_generator(generate), tokenizer, n=4, length=8)
    assert len(read) < 2000  # a shuffle buffer, twice: once for looking at the columns


def test_missing_texts_are_skipped(tokenizer):
    table = datasets.Dataset.from_dict({"text": [None, words(0, 7), "", None]})
    assert rows(table, tokenizer, n=1).tolist() == [[*range(7), EOS]]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_files(suffix, tokenizer, tmp_path):
    path = tmp_path / f"calibration{suffix}"
    texts = [words(i * 100, i * 100 + 100) for i in range(10)]
    if suffix == ".txt":
        path.write_text("\n\n".join(texts), encoding="utf-8")
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n\n", encoding="utf-8")
    else:
        datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    used = ids_of(path, tokenizer, n=30, length=32)
    assert len(used) - used.count(EOS) == len(set(used) - {EOS}) > 900
    assert ids_of(str(path), tokenizer, n=30, length=32) == used
    result = batches(path, tokenizer)
    assert result.description == f"the file calibration{suffix}: 4 sequences of 8 tokens, seed 0"


def test_jsonl_of_strings(tokenizer, tmp_path):
    path = tmp_path / "strings.jsonl"
    path.write_text("\n".join(json.dumps(words(i, i + 3)) for i in (0, 10)), encoding="utf-8")
    assert rows(path, tokenizer, n=1).tolist() == [[0, 1, 2, EOS, 10, 11, 12, EOS]]


def test_chats_go_through_the_template():
    tokenizer = make_tokenizer(adds_bos=True)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}"
        "{{ ' w1 ' if m.role == 'user' else ' w2 ' }}{{ m.content }}{% endfor %}"
    )
    chat = [{"role": "user", "content": "w30 w31"}, {"role": "assistant", "content": "w40"}]
    table = datasets.Dataset.from_dict({"messages": [chat, chat], "source": ["s", "s"]})
    expected = [1, 30, 31, 2, 40]
    assert rows(table, tokenizer, n=1, length=11).tolist() == [[BOS, *expected, *expected]]


@pytest.mark.parametrize(
    "kind", ["tensors", "lists", "one tensor", "matrix", "input_ids", "formatted", "batched"]
)
def test_token_ids_need_no_tokenizer_and_get_no_special_tokens(kind):
    ids = torch.arange(320)
    table = datasets.Dataset.from_dict({"input_ids": ids.view(40, 8).tolist(), "text": ["x"] * 40})
    dataset = {
        "tensors": list(ids.view(40, 8).int()),
        "lists": ids.view(40, 8).tolist(),
        "one tensor": ids,
        "matrix": ids.view(40, 8),
        "input_ids": table,
        "formatted": table.with_format("torch"),
        "batched": list(ids.view(40, 1, 8)),
    }[kind]
    result = rows(dataset, None, n=40)
    assert torch.equal(result[result[:, 0].argsort()], ids.view(40, 8))
    assert not torch.equal(result, ids.view(40, 8))


def test_long_token_sequences_are_cut_from_their_start_and_short_ones_joined():
    long = [list(range(100, 119)), list(range(200, 208))]
    result = rows([*long, [1, 2, 3], [4, 5, 6, 7, 8, 9]], None, n=4)
    by_start = {int(row[0]): row.tolist() for row in result}
    assert by_start.keys() >= {100, 108, 200}
    assert by_start[100] == list(range(100, 108)) and by_start[108] == list(range(108, 116))
    (joined,) = (row for start, row in by_start.items() if start < 100)
    assert joined in ([1, 2, 3, 4, 5, 6, 7, 8], [4, 5, 6, 7, 8, 9, 1, 2])


def test_padding_is_left_out():
    table = datasets.Dataset.from_dict(
        {"input_ids": [[0, 0, 1, 2]] * 4, "attention_mask": [[0, 0, 1, 1]] * 4}
    )
    assert rows(table, None, n=1).tolist() == [[1, 2] * 4]


# --- the Hub


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (DEFAULT_DATASET, ("HuggingFaceFW/fineweb-edu", "sample-10BT")),
        ("someone/texts", ("someone/texts", None)),
        ("wikitext:wikitext-2-raw-v1", ("wikitext", "wikitext-2-raw-v1")),
    ],
)
def test_a_hub_dataset_is_streamed(name, arguments, tokenizer, monkeypatch, no_network):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict(
            {"id": ["x"] * 99, "text": [words(0, 99)] * 99}
        ).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    result = batches(name, tokenizer)
    assert calls == [(arguments, {"split": "train", "streaming": True})]
    assert result.description == f"the Hub dataset {name}: 4 sequences of 8 tokens, seed 0"


THREE_WAYS_OUT = (
    r"cannot be read from the Hugging Face Hub .*\(1\).*connect.*\(2\).*list of strings.*\(3\).*\"builtin\""
)


def test_a_hub_dataset_without_network(tokenizer, no_network, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(RuntimeError, match=f"'{DEFAULT_DATASET}' {THREE_WAYS_OUT}"):
        batches(DEFAULT_DATASET, tokenizer)


def test_a_hub_dataset_that_breaks_off(tokenizer, monkeypatch, no_network):
    class HTTPError(Exception):
        """The Hub's client has its own base class of errors, not OSError."""

    def generate():
        yield {"text": "w1"}
        raise HTTPError("connection reset")

    stream = datasets.IterableDataset.from_generator(generate)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
    with pytest.raises(RuntimeError, match=r"HTTPError: connection reset\). Three ways out"):
        batches("someone/texts", tokenizer)


# --- bad input


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "the dataset is empty"),
        (["", "  \n"], "the dataset is empty: a list of 2 texts holds no text"),
        ([[]], "the dataset is empty"),
        (datasets.Dataset.from_dict({"text": []}), "the dataset is empty: it has 0 rows"),
        (datasets.IterableDataset.from_generator(lambda: iter(())), "the dataset is empty: a streamed"),
        (
            [words(0, 30)],
            r"num_samples=4 .* sequence_length=8 .* gives only 3 \(31 tokens\); lower num_samples to 3",
        ),
        (["w1 w2"], r"gives only 0 \(3 tokens\); lower sequence_length, or bring more text"),
        ([[1] * 20], r"gives only 2 \(16 tokens\); lower num_samples to 2"),
        (
            datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]}),
            r"the columns \['a', 'b'\] \(2 of them strings\)",
        ),
        (
            datasets.Dataset.from_dict({"label": [1]}),
            r"must have a column input_ids, text or messages.*'label'",
        ),
        ({"train": ["w1"]}, r"must be one split or a list, got a mapping with keys \['train'\]"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["w1"]})), r"dataset\[\"train\"\]"),
        (3.14, "dataset must be a Hub dataset's name, .* got float"),
        (None, "got NoneType"),
        ("some text of its own", r"to calibrate on a text itself pass a list of strings"),
        ("no_such_file.txt", "there is no file 'no_such_file.txt'"),
        ([torch.rand(9)], r"token ids must be 1-D integers, got torch.float32 of shape \[9\]"),
        ([torch.ones(2, 9).long()], r"token ids must be 1-D integers, got torch.int64 of shape \[2, 9\]"),
        ([[1, "x"]], "token ids must be 1-D integers, got list"),
        ([None], "token ids must be 1-D integers, got NoneType"),
        ([words(0, 99), 5], "must be strings or lists of messages, got a int"),
        ([{"text": "w1"}, "w2"], "every row must have the column 'text', got a str"),
        ([[1, 2, WORDS + 2] * 40], rf"token ids must be in \[0, {WORDS + 2}\), .* got {WORDS + 2}"),
        ([[1, 2, -1] * 40], r"got -1; use the tokenizer that belongs to the model"),
        ([[{"role": "user", "content": "w1"}]], "token ids must be 1-D integers"),
        (
            [{"messages": [{"role": "user", "content": "w1"}]}],
            "need a chat template, got a tokenizer without one",
        ),
    ],
)
def test_bad_datasets(dataset, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        batches(dataset, tokenizer)


def test_bad_files(tokenizer, tmp_path):
    for name, content, message in [
        ("a.csv", b"w1", "must be one of .txt, .jsonl, .parquet, got 'a.csv'"),
        ("b.txt", b"\xff\xfe\xfa", "'b.txt' must be UTF-8 text"),
        ("c.txt", b"", "the dataset is empty: the file c.txt"),
        ("d.jsonl", b'{"text": "w1"}\n{"text": ', "line 2 of 'd.jsonl' must be JSON"),
        ("e.jsonl", b"\n", "the dataset is empty: the file e.jsonl"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            batches(str(tmp_path / name), tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 65, "max_length": 64}, "at most the model's max_position_embeddings, 64, got 65; lower"),
        ({"n": 0}, "num_samples must be a positive integer, got 0"),
        ({"length": -1}, "sequence_length must be a positive integer, got -1"),
        ({"batch_size": 2.5}, "batch_size must be a positive integer, got 2.5"),
        ({"vocab_size": 5}, r"token ids must be in \[0, 5\), the model's vocabulary, got"),
    ],
)
def test_bad_sizes(changes, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        batches([words(0, 999)], tokenizer, **changes)


def test_text_without_tokenizer():
    with pytest.raises(
        ValueError, match="a list of 1 texts needs a tokenizer, got tokenizer=None; pass tokenizer"
    ):
        batches(["w1"], None)


def no_vocabulary():
    """What AutoTokenizer makes up for a model without tokenizer files."""
    return make_tokenizer(words=0, unknown="<bos>")


def test_a_made_up_tokenizer_is_none():
    with pytest.raises(
        ValueError, match=r"needs a tokenizer, got one of 2 special tokens only \(is the model"
    ):
        batches(["w1"], no_vocabulary())


def test_no_room_beside_bos(bos_tokenizer):
    with pytest.raises(ValueError, match="more than the 1 tokens that the tokenizer begins with, got 1"):
        batches([words(0, 9)], bos_tokenizer, n=1, length=1)

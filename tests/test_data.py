"""Calibration data. The tokenizer here maps the word "w17" to the id 17, so tests know the ids of a text."""

import hashlib
import json
import socket

import datasets
import numpy as np
import pytest
import torch
from model_zoo import VOCAB, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, PreTrainedTokenizerFast

from hf_fp4.calibration import data
from hf_fp4.calibration.data import builtin_batches, calibration_batches
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


def test_a_made_up_tokenizer_is_none(model):
    with pytest.raises(
        ValueError, match=r"needs a tokenizer, got one of 2 special tokens only \(is the model"
    ):
        batches(["w1"], no_vocabulary())
    assert builtin(model, no_vocabulary()).fingerprint == builtin(model).fingerprint


def test_no_room_beside_bos(bos_tokenizer):
    with pytest.raises(ValueError, match="more than the 1 tokens that the tokenizer begins with, got 1"):
        batches([words(0, 9)], bos_tokenizer, n=1, length=1)


# --- "builtin"


def builtin(model, tokenizer=None, *, n=6, length=20, seed=0, **changes):
    sizes = {"num_samples": n, "sequence_length": length, "batch_size": 4, "seed": seed, "vocab_size": VOCAB}
    return builtin_batches(model, tokenizer, **(sizes | changes))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def small_tokenizer(adds_bos=False):
    return make_tokenizer(words=200, adds_bos=adds_bos)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "opt", "bloom"])
def test_the_model_writes_without_a_tokenizer(family):
    model = tiny_model(family)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    before = model.generation_config.to_dict()
    first, again, other = builtin(model), builtin(model), builtin(model, seed=1)
    assert [tuple(batch.shape) for batch in first.batches] == [(4, 20), (2, 20)]
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert "the model wrote itself" in first.description
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.generation_config.to_dict() == before


def test_builtin_is_a_dataset(model):
    sizes = {"num_samples": 6, "sequence_length": 20, "batch_size": 4, "seed": 0, "vocab_size": VOCAB}
    result = calibration_batches("builtin", None, model=model, max_length=128, **sizes)
    assert result.fingerprint == builtin(model).fingerprint


def test_generation_settings_and_mode_of_the_model_are_ignored_and_kept(model):
    expected = builtin(model).fingerprint
    model.generation_config.eos_token_id = list(range(VOCAB))  # would stop at once
    model.generation_config.repetition_penalty = 5.0
    model.train()
    try:
        assert builtin(model).fingerprint == expected
        assert model.training and model.generation_config.repetition_penalty == 5.0
    finally:
        model.eval()
        model.generation_config = type(model.generation_config)()


def test_pieces_are_packed_and_only_a_row_begins_with_bos(model, monkeypatch):
    monkeypatch.setattr(data, "_SAMPLED", data._Sampling(max_tokens=16))
    tokenizer = small_tokenizer(adds_bos=True)
    banned_bos = torch.cat(builtin(model, tokenizer, n=5, length=50).batches)
    assert banned_bos.shape == (5, 50)
    assert (banned_bos[:, 0] == 200).all()
    assert (banned_bos < 202).all()  # ids that the tokenizer does not have are never drawn


def test_what_a_piece_depends_on(model):
    """Not on how many are sampled at once: the uniform numbers are given."""
    request = data._Request(7, 12, 7, 0, VOCAB)
    together, apart = (
        data._SelfWriter(model, None, request, data._Sampling(pieces=pieces)).rows() for pieces in (64, 2)
    )
    assert torch.equal(together, apart)


@pytest.mark.parametrize("start", ["random", "document", "opening"])
def test_starts(start, model, monkeypatch):
    monkeypatch.setattr(data, "_OPENINGS", "w5 w6 w7 / w8 w9")
    tokenizer = small_tokenizer()
    writer = data._SelfWriter(
        model, tokenizer, data._Request(8, 12, 8, 0, VOCAB), data._Sampling(start=start)
    )
    result = writer.rows()
    if start == "document":
        assert (result[:, 0] == 200).all()
    elif start == "opening":
        assert {tuple(row[:2].tolist()) for row in result} == {(5, 6), (8, 9)}
        assert all(row[2] == 7 for row in result if row[0] == 5)
    else:
        assert (result[:, 0] < 200).all() and len(set(result[:, 0].tolist())) > 4


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (1.0, 2)])
def test_tokens_are_drawn_from_the_models_distribution(temperature, top_k):
    logits = torch.tensor([1.0, -1.0, 2.0, 0.5, 9.0, 7.0])
    banned = torch.tensor([False, False, False, False, True])  # 4 is banned, 5 beyond the vocabulary
    n = 20_000
    uniform = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5).div(n).expand(-1, 2)

    class Progress:
        def update(self, count):
            pass

    plan = data._Sampling(temperature=temperature, top_k=top_k)
    sampler = data._InverseCDF(uniform, torch.full((n, 2), -1), banned, plan, Progress())
    scores = sampler(torch.zeros(n, 1, dtype=torch.int64), logits.expand(n, -1))
    assert ((scores == 0).sum(-1) == 1).all() and ((scores == -torch.inf).sum(-1) == 5).all()
    drawn = np.bincount(scores.argmax(-1).numpy(), minlength=6) / n
    expected = np.exp(logits.double().numpy()[:4] / temperature)
    if top_k:
        expected[[1, 3]] = 0
    np.testing.assert_allclose(drawn, [*(expected / expected.sum()), 0, 0], atol=1e-4)


def test_out_of_memory_halves_the_pieces(model, monkeypatch):
    expected = builtin(model).fingerprint
    real, sizes = data._SelfWriter._generate, []

    def generate(self, heads, length, sampler):
        sizes.append(len(heads))
        if len(heads) > 2:
            raise torch.OutOfMemoryError("no room")
        return real(self, heads, length, sampler)

    monkeypatch.setattr(data, "_SAMPLED", data._Sampling(pieces=8))
    monkeypatch.setattr(data._SelfWriter, "_generate", generate)
    assert builtin(model).fingerprint == expected
    assert sizes == [6, 4, 2, 2, 2]


def test_image_placeholders_are_never_drawn(model):
    model.config.image_token_id = 17
    try:
        banned = data._SelfWriter(model, None, data._Request(1, 8, 1, 0, VOCAB), data._Sampling())._banned()
    finally:
        del model.config.image_token_id
    assert banned.nonzero().flatten().tolist() == [17]


def test_the_library_is_enough_text_for_the_default_size():
    texts = data._library_texts()
    assert sum(map(len, texts)) > 128 * 2048 * 4
    assert all(len(text) <= data._FRAGMENT_CHARS for text in texts)


def test_a_model_that_cannot_generate_is_calibrated_on_the_library(model, caplog, monkeypatch):
    encoder = AutoModel.from_config(model.config)
    monkeypatch.setattr(data, "_library_texts", lambda: [words(0, 200)])
    monkeypatch.setattr(data.logger, "propagate", True)
    result = builtin(encoder, small_tokenizer())
    assert "cannot generate text" in caplog.text
    assert "documentation of the Python library" in result.description
    assert torch.cat(result.batches).shape == (6, 20)
    with pytest.raises(ValueError, match="needs a causal LM or a tokenizer, got LlamaModel"):
        builtin(encoder)


def test_builtin_errors(model):
    with pytest.raises(ValueError, match='dataset="builtin" is text that the model writes, got model=None'):
        builtin(None)
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 256\), .* tokenizer that belongs"):
        builtin(model, make_tokenizer(words=5000, adds_bos=True))
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(RuntimeError, match="the model's logits must be finite to write calibration text"):
        builtin(broken)

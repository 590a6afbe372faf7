"""Perplexity, KL divergence and top-1 agreement, against the definitions in numpy float64."""

import importlib
import json
import math

import numpy as np
import pytest
import torch
from model_zoo import VOCAB, tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import hf_fp4
from hf_fp4.evaluate import EvaluationResult, evaluate

BOS, EOS = VOCAB - 2, VOCAB - 1


def make_tokenizer(*, adds_bos=False):
    """The word "w17" is the id 17."""
    vocab = {f"w{i}": i for i in range(VOCAB - 2)} | {"<bos>": BOS, "<eos>": EOS}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="w0", bos_token="<bos>", eos_token="<eos>"
    )


NO_VOCABULARY = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1}, "<unk>")),
    unk_token="<unk>",
    eos_token="<eos>",
)


def sharpened(family, seed):
    """A random model whose predictions are far from uniform."""
    model = tiny_model(family, seed=seed)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3.0)
    return model


@pytest.fixture(scope="module")
def model():
    return sharpened("llama-144", 0)


@pytest.fixture(scope="module")
def reference():
    return sharpened("llama-144", 1)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(VOCAB - 2, (7 * 16 + 5,), generator=torch.Generator().manual_seed(3))


def text_of(ids):
    return " ".join(f"w{i}" for i in ids.tolist())


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def definition(model, reference, windows):
    """Perplexity of both, mean KL(reference || model), share of equal argmax; float64, window by window."""
    losses, reference_losses, divergences, agreed = [], [], [], []
    for window in windows:
        with torch.no_grad():
            p, q = (log_softmax(m(window[None]).logits[0, :-1].double().numpy()) for m in (model, reference))
        positions = np.arange(len(window) - 1)
        losses.extend(-p[positions, window[1:].numpy()])
        reference_losses.extend(-q[positions, window[1:].numpy()])
        divergences.extend((np.exp(q) * (q - p)).sum(-1))
        agreed.extend(p.argmax(-1) == q.argmax(-1))
    loss, reference_loss, divergence, agreement = map(
        np.mean, (losses, reference_losses, divergences, agreed)
    )
    return math.exp(loss), math.exp(reference_loss), divergence, agreement


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("chunk_logits", [1, 5 * VOCAB, 1 << 24])
def test_against_the_definition(batch_size, chunk_logits, model, reference, ids, monkeypatch):
    module = importlib.import_module("hf_fp4.evaluate")  # the attribute of this name is the function
    monkeypatch.setattr(module, "_CHUNK_LOGITS", chunk_logits)
    result = evaluate(
        model, ids, reference=reference, sequence_length=16, batch_size=batch_size, progress=False
    )
    windows = ids[: 7 * 16].view(7, 16)
    perplexity, reference_perplexity, divergence, agreement = definition(model, reference, windows)
    assert result.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert result.reference_perplexity == pytest.approx(reference_perplexity, rel=1e-5)
    assert result.kl_divergence == pytest.approx(divergence, rel=1e-5)
    assert result.top1_agreement == agreement
    assert (result.num_tokens, result.sequence_length) == (7 * 15, 16)
    assert 0 < agreement < 1 and divergence > 0.1


def test_without_reference(model, ids):
    result = evaluate(model, ids, sequence_length=16, progress=False)
    assert result.perplexity == pytest.approx(
        definition(model, model, ids[: 7 * 16].view(7, 16))[0], rel=1e-5
    )
    assert result.reference_perplexity is result.kl_divergence is result.top1_agreement is None
    assert str(result).splitlines() == [
        f"perplexity            {result.perplexity:.4f}",
        "over 105 tokens in windows of 16",
    ]


def test_a_model_agrees_with_itself(model, ids):
    result = evaluate(model, ids, reference=model, sequence_length=16, progress=False)
    assert result.kl_divergence == 0 and result.top1_agreement == 1
    assert result.perplexity == result.reference_perplexity


def test_bfloat16_is_scored_in_float32(ids):
    model, reference = (sharpened("qwen3", seed).bfloat16() for seed in (0, 1))
    result = evaluate(model, ids, reference=reference, sequence_length=16, batch_size=1, progress=False)
    perplexity, _, divergence, agreement = definition(model, reference, ids[: 7 * 16].view(7, 16))
    assert result.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert result.kl_divergence == pytest.approx(divergence, rel=1e-5)
    assert result.top1_agreement == agreement


@pytest.mark.parametrize("kind", ["string", "strings", "path", "path string", "ids", "int32 ids"])
def test_kinds_of_text(kind, model, ids, tmp_path):
    path = tmp_path / "held out.txt"
    path.write_text(text_of(ids), encoding="utf-8")
    text = {
        "string": text_of(ids),
        "strings": [text_of(ids)],
        "path": path,
        "path string": str(path),
        "ids": ids,
        "int32 ids": ids.int(),
    }[kind]
    tokenizer = None if "ids" in kind else make_tokenizer()
    result = evaluate(model, text, tokenizer, sequence_length=16, progress=False)
    assert result == evaluate(model, ids, sequence_length=16, progress=False)


def test_each_window_begins_with_bos_if_the_tokenizer_adds_one(model, ids):
    result = evaluate(model, text_of(ids), make_tokenizer(adds_bos=True), sequence_length=17, progress=False)
    windows = torch.cat((torch.full((7, 1), BOS), ids[: 7 * 16].view(7, 16)), dim=1)
    assert result.perplexity == pytest.approx(definition(model, model, windows)[0], rel=1e-5)
    assert result == evaluate(model, windows, progress=False)


def test_documents_are_joined_by_eos(model):
    result = evaluate(model, ["w1 w2 w3", "w4"], make_tokenizer(), progress=False)
    assert result == evaluate(model, torch.tensor([1, 2, 3, EOS, 4, EOS]), progress=False)


def test_sizes(model, ids):
    def size(text, **options):
        result = evaluate(model, text, progress=False, **options)
        return result.num_tokens, result.sequence_length

    assert size(ids) == (116, 117)  # the default window is longer: one window
    assert size(ids, sequence_length=16, max_tokens=40) == (30, 16)
    assert size(ids, sequence_length=16, max_tokens=10) == (9, 10)
    assert size(ids[:112].view(4, 28)) == (4 * 27, 28)
    assert size(ids[:2], sequence_length=2) == (1, 2)


def test_the_models_modes_are_kept(ids):
    model, reference = tiny_model("llama-144").train(), tiny_model("llama-144")
    evaluate(model, ids, reference=reference, sequence_length=16, progress=False)
    assert model.training and not reference.training


def test_the_result(model, reference, ids):
    result = evaluate(model, ids, reference=reference, sequence_length=16, progress=False)
    assert EvaluationResult(**json.loads(json.dumps(result.to_dict()))) == result
    assert str(EvaluationResult(12.5, 1000, 512, 12.0, 0.04321, 0.9125)) == (
        "perplexity            12.5000\n"
        "reference perplexity  12.0000\n"
        "KL divergence         0.0432 nats per token\n"
        "top-1 agreement       91.25 %\n"
        "over 1000 tokens in windows of 512"
    )
    assert hf_fp4.evaluate is evaluate


def test_progress(model, ids, capsys):
    evaluate(model, ids, sequence_length=16, batch_size=3)
    assert "Evaluating" in capsys.readouterr().err
    evaluate(model, ids, sequence_length=16, progress=False)
    assert not capsys.readouterr().err


def test_a_hopeless_model_has_infinite_perplexity(ids):
    model = tiny_model("llama-144")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e6)
    assert evaluate(model, ids, sequence_length=16, progress=False).perplexity == math.inf


@pytest.mark.gpu
def test_models_on_two_devices(model, reference, ids):
    on_gpu = sharpened("llama-144", 0).to("cuda")
    result = evaluate(on_gpu, ids, reference=reference, sequence_length=16, progress=False)
    expected = evaluate(model, ids, reference=reference, sequence_length=16, progress=False)
    assert result.kl_divergence == pytest.approx(expected.kl_divergence, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "text must hold at least 2 tokens to predict one, got 0; pass more text"),
        (" \n ", {}, "text must hold at least 2 tokens to predict one, got 0"),
        ([], {}, "text must hold at least 2 tokens to predict one, got 0"),
        (torch.tensor([1]), {}, "text must hold at least 2 tokens to predict one, got 1"),
        ("w1 w2 w3", {"tokenizer": None}, "text needs a tokenizer, got tokenizer=None"),
        (
            "w1 w2 w3",
            {"tokenizer": NO_VOCABULARY},
            "text needs a tokenizer, got one of 2 special tokens only",
        ),
        ("no_such_file.txt", {}, "text names a file, but there is no file 'no_such_file.txt'"),
        (3, {}, "text must be a string, a list of strings, .* got int"),
        ([1, 2], {}, "text must be a string, a list of strings, .* got list"),
        (
            torch.rand(9),
            {},
            r"token ids must be integers \[n\] or \[windows, T\], got torch.float32 of \[9\]",
        ),
        (
            torch.tensor([1, VOCAB]),
            {},
            rf"must be in \[0, {VOCAB}\), the vocabulary of LlamaForCausalLM, got {VOCAB};",
        ),
        (torch.tensor([1, -1]), {}, "got -1; use the tokenizer that belongs to the model"),
        ("w1 w2", {"sequence_length": 1}, "sequence_length must be at least 2, .* got 1"),
        (
            "w1 " * 200,
            {"sequence_length": 129},
            "at most max_position_embeddings of LlamaForCausalLM, 128, got 129",
        ),
        ("w1 w2", {"max_tokens": 1}, "max_tokens must be None or at least 2, got 1"),
        ("w1 w2", {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_input(text, options, message, model):
    options = {"tokenizer": make_tokenizer(), "progress": False, "sequence_length": 16} | options
    with pytest.raises(ValueError, match=message):
        evaluate(model, text, **options)


def test_a_file_that_is_no_text(model, tmp_path):
    path = tmp_path / "binary.txt"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="'binary.txt' must be UTF-8 text"):
        evaluate(model, path, make_tokenizer(), progress=False)


def test_different_vocabularies(model, ids):
    config = tiny_config("llama-144")
    config.vocab_size = VOCAB + 64
    other = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        ValueError, match=f"same vocabulary, got {VOCAB} logits .* and {VOCAB + 64} from Llama"
    ):
        evaluate(model, ids, reference=other, sequence_length=16, progress=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_logits_name_the_model(value, model, ids):
    broken = tiny_model("qwen3")
    with torch.no_grad():
        broken.model.norm.weight[0] = value
    broken.config._name_or_path = "somewhere/broken"
    message = (
        r"logits must be finite, got NaN or inf from Qwen3ForCausalLM \(somewhere/broken\); check its weights"
    )
    with pytest.raises(RuntimeError, match=message):
        evaluate(broken, ids, sequence_length=16, progress=False)
    with pytest.raises(RuntimeError, match=message):
        evaluate(model, ids, reference=broken, sequence_length=16, progress=False)

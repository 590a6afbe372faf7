"""What users do with a transformers model besides loading it: pipelines, other architectures, devices, copies, generation."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from pathlib import Path

import pytest
import torch
from model_zoo import VOCAB, tiny_config, tiny_model, tiny_tokens
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    CLIPImageProcessor,
    GenerationConfig,
    LlavaProcessor,
    LongT5Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    pipeline,
)

from hf_fp4 import FP4Linear, MRGPTQConfig

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = [{"role": "user", "content": "What is FP4?"}]
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
TOKENS = tiny_tokens(2, 12, seed=4)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, within the zoo's vocabulary and with its special tokens."""
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB - len(special)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=TEMPLATE,
        padding_side="left",
    )


def save(directory: Path, model: PreTrainedModel) -> Path:
    """What a user starts from: weights, tokenizer, generation config."""
    if model.can_generate():
        model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=2, bos_token_id=1)
        if model.config.is_encoder_decoder:
            model.generation_config.decoder_start_token_id = 0
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def rounded(source: Path, auto_class: type = AutoModelForCausalLM, **fields) -> PreTrainedModel:
    return auto_class.from_pretrained(source, quantization_config=MRGPTQConfig(method="rtn", **fields))


def fp4_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FP4Linear)]


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("original"), tiny_model("llama"))


@pytest.fixture(scope="module")
def checkpoint(original, tmp_path_factory) -> Path:
    """A calibrated W4A4 model with its tokenizer, in shards."""
    directory = tmp_path_factory.mktemp("quantized")
    config = MRGPTQConfig(dataset=list(tiny_tokens(4, 16)), num_samples=4, sequence_length=16, batch_size=2)
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    model.save_pretrained(directory, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def model(checkpoint) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint)


# --- pipelines


@pytest.fixture(scope="module")
def generator(checkpoint):
    return pipeline("text-generation", model=str(checkpoint))


def test_text_generation_is_generate(generator):
    assert len(fp4_names(generator.model)) == 14
    prompt = "The moon"
    inputs = generator.tokenizer(prompt, return_tensors="pt")
    expected = generator.model.generate(**inputs, **GREEDY)[0]
    assert expected.shape == (len(prompt) + 6,)
    assert generator(prompt, **GREEDY)[0]["generated_text"] == generator.tokenizer.decode(expected)


def test_text_generation_chat(generator):
    answer = generator(CHAT, **GREEDY)[0]["generated_text"]
    assert answer[:-1] == CHAT and answer[-1]["role"] == "assistant"
    inputs = generator.tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    expected = generator.model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    assert answer[-1]["content"] == generator.tokenizer.decode(expected)


def test_text_generation_batch(generator):
    """Rows are independent, padded ones too."""
    prompts = ["The moon", "A", "What is a floating point number?"]
    alone = [generator(prompt, **GREEDY)[0]["generated_text"] for prompt in prompts]
    together = [answer[0]["generated_text"] for answer in generator(prompts, batch_size=3, **GREEDY)]
    assert together == alone


def test_text_generation_streaming(generator):
    streamer = TextIteratorStreamer(generator.tokenizer, skip_prompt=True, timeout=60)
    results = []
    thread = threading.Thread(
        target=lambda: results.extend(generator(CHAT, streamer=streamer, **GREEDY)), daemon=True
    )
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed and streamed == results[0]["generated_text"][-1]["content"]


def test_feature_extraction_with_a_decoder(checkpoint):
    extractor = pipeline("feature-extraction", model=str(checkpoint))
    with torch.no_grad():
        expected = extractor.model(**extractor.tokenizer("The moon", return_tensors="pt")).last_hidden_state
    assert len(fp4_names(extractor.model)) == 14
    assert torch.equal(extractor("The moon", return_tensors=True), expected)


def test_feature_extraction_with_an_encoder(tmp_path):
    source = save(tmp_path / "original", AutoModel.from_config(tiny_config("bert")).eval())
    rounded(source, AutoModel, activations="bf16").save_pretrained(tmp_path / "quantized")
    byte_tokenizer().save_pretrained(tmp_path / "quantized")
    features = [
        pipeline("feature-extraction", model=str(path))("The moon", return_tensors=True)
        for path in (source, tmp_path / "quantized")
    ]
    assert features[0].shape == (1, 8, 64)
    assert 0.001 < (features[1] - features[0]).norm() / features[0].norm() < 0.3


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> Path:
    """A tiny LLaVA, rounded as it is loaded, with its processor."""
    directory = tmp_path_factory.mktemp("vlm")
    save(directory / "original", tiny_model("llava"))
    model = rounded(directory / "original", AutoModelForImageTextToText)
    model.save_pretrained(directory / "quantized")
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=byte_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(directory / "quantized")
    return directory / "quantized"


def test_image_text_to_text(vlm):
    describer = pipeline("image-text-to-text", model=str(vlm))
    fp4 = fp4_names(describer.model)
    assert len(fp4) == 14 and all(".language_model." in name for name in fp4)
    answers = []
    for color in ("black", "white"):
        content = [
            {"type": "image", "image": Image.new("RGB", (20, 16), color)},
            {"type": "text", "text": "What is this?"},
        ]
        output = describer(text=[{"role": "user", "content": content}], generate_kwargs=GREEDY)
        assert output[0]["generated_text"][-1]["role"] == "assistant"
        answers.append(output[0]["generated_text"][-1]["content"])
    assert answers[0] != answers[1], "the picture is not seen"


def test_a_vision_tower_is_left_alone(vlm):
    model = AutoModelForImageTextToText.from_pretrained(vlm)
    before = tiny_model("llava")
    for part in ("vision_tower", "multi_modal_projector"):
        tensors, expected = (getattr(m.model, part).state_dict() for m in (model, before))
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)


# --- encoders and encoder-decoders


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_an_encoder(format, tmp_path):
    source = save(tmp_path / "original", tiny_model("bert"))
    model = rounded(source, AutoModelForMaskedLM, format=format)
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "quantized")
    assert len(fp4_names(again)) == 12 and torch.equal(logits(again), logits(model))


def test_weights_that_a_checkpoint_lacks_are_not_rounded(tmp_path):
    """A masked language model has no pooler, and without its head transformers makes a new one."""
    source = save(tmp_path / "original", tiny_model("bert"))
    message = r"no weight for pooler\.dense \(and 0 more\); .* name them in modules_to_not_convert"
    with pytest.raises(ValueError, match=message):
        rounded(source, AutoModel)
    model = rounded(source, AutoModel, modules_to_not_convert=["pooler"])
    assert len(fp4_names(model)) == 12 and type(model.pooler.dense) is nn.Linear
    assert model(TOKENS).last_hidden_state.isfinite().all()
    # Nor is what is new when a checkpoint is reloaded.
    rounded(source, AutoModelForMaskedLM).save_pretrained(tmp_path / "quantized")
    model = AutoModel.from_pretrained(tmp_path / "quantized")
    assert len(fp4_names(model)) == 12 and model.pooler.dense.weight.std() > 0


ENCODER_DECODERS = {
    "t5": lambda: tiny_config("t5"),
    # Its feed-forward casts to the dtype of wo's weight and it keeps nothing in float32.
    "longt5": lambda: LongT5Config(
        vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, local_radius=8
    ),
    "bart": lambda: BartConfig(
        vocab_size=VOCAB,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        forced_eos_token_id=None,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_encoder_decoder_generates(family, dtype, tmp_path):
    """Also where a model's own code casts to the dtype of a linear's weight, which is uint8 when it is packed."""
    unquantized = AutoModelForSeq2SeqLM.from_config(ENCODER_DECODERS[family]()).to(dtype).eval()
    source = save(tmp_path / "original", unquantized)
    model = rounded(source, AutoModelForSeq2SeqLM, activations="bf16")
    assert len(fp4_names(model)) >= 28
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "quantized")
    assert again.dtype == dtype
    start = torch.zeros(2, 3, dtype=torch.long)
    with torch.no_grad():
        expected, actual, reloaded = (
            m(TOKENS, decoder_input_ids=start).logits.float() for m in (unquantized, model, again)
        )
    assert 1e-5 < (actual - expected).norm() / expected.norm() < 0.4
    assert torch.equal(reloaded, actual)
    output = again.generate(TOKENS, **GREEDY)
    assert output.shape == (2, 7) and torch.equal(output, model.generate(TOKENS, **GREEDY))


# --- the rest of what a model can do


def test_dequantize(model, tmp_path):
    packed = model.get_memory_footprint()
    weights = {name: model.get_submodule(name).dequantize(torch.float32) for name in fp4_names(model)}
    model.dequantize()
    assert len(weights) == 14 and not fp4_names(model)
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    assert model.get_memory_footprint() > packed
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_dequantize_to_another_dtype(model):
    expected = logits(AutoModelForCausalLM.from_pretrained(model.name_or_path))
    model.dequantize(torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert (logits(model.to(torch.bfloat16)).float() - expected).norm() < 0.3 * expected.norm()


def test_memory_footprint(model, original):
    unquantized = AutoModelForCausalLM.from_pretrained(original)
    saved = sum(
        4 * layer.in_features * layer.out_features - sum(buffer.nbytes for buffer in layer.buffers())
        for layer in model.modules()
        if isinstance(layer, FP4Linear)
    )
    assert saved > 0 and unquantized.get_memory_footprint() - model.get_memory_footprint() == saved


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
"""On weights only: FP4 activations of a random model differ by a quarter between float32 and bfloat16."""


@pytest.fixture(scope="module")
def weights_only(original, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("weights-only")
    rounded(original, activations="bf16").save_pretrained(directory)
    return directory


@DTYPES
def test_moving_and_casting(dtype, weights_only):
    model = AutoModelForCausalLM.from_pretrained(weights_only)
    expected, before = logits(model), {name: model.get_buffer(f"{name}.weight") for name in fp4_names(model)}
    assert model.to("cpu") is model and torch.equal(logits(model), expected)
    assert model.to(dtype) is model and model.dtype == dtype
    assert all(torch.equal(model.get_buffer(f"{name}.weight"), weight) for name, weight in before.items())
    assert_near(model, expected, dtype)


@DTYPES
def test_loading_with_another_dtype(dtype, weights_only):
    model = AutoModelForCausalLM.from_pretrained(weights_only)
    other = AutoModelForCausalLM.from_pretrained(weights_only, dtype=dtype)
    assert {parameter.dtype for parameter in other.parameters()} == {dtype}
    for name, buffer in model.named_buffers():
        assert torch.equal(other.get_buffer(name), buffer)
    assert_near(other, logits(model), dtype)
    assert other.generate(TOKENS, **GREEDY).shape == (2, 18)


def assert_near(model: PreTrainedModel, expected: torch.Tensor, dtype: torch.dtype) -> None:
    actual = logits(model)
    assert actual.dtype == dtype
    assert (actual.float() - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(device_map, checkpoint, model):
    placed = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=device_map)
    assert len(fp4_names(placed)) == 14
    assert torch.equal(logits(placed), logits(model))


@pytest.mark.parametrize("buffers", [False, True])
def test_offloading(buffers, checkpoint, model, tmp_path):
    """The packed weights are buffers: with offload_buffers they wait on the disk, without they stay in memory."""
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    offloaded = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        device_map={**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"},
        offload_folder=str(tmp_path / "offload"),
        offload_buffers=buffers,
    )
    layer = offloaded.model.layers[1].mlp.up_proj
    assert layer.weight.is_meta == buffers and not offloaded.model.layers[0].mlp.up_proj.weight.is_meta
    for _ in range(2):
        assert torch.equal(logits(offloaded), logits(model))
    assert torch.equal(offloaded.generate(TOKENS, **GREEDY), model.generate(TOKENS, **GREEDY))
    assert layer.weight.is_meta == buffers, "it goes back to the disk after each use"


def test_shards(checkpoint, model, tmp_path):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and all((checkpoint / file).is_file() for file in files)
    assert index["metadata"]["total_size"] == model.get_memory_footprint() - sum(
        buffer.nbytes for name, buffer in model.named_buffers() if "inv_freq" in name
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_deepcopy(model):
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert len(fp4_names(twin)) == 14 and torch.equal(logits(twin), expected)
    twin.model.layers[0].mlp.up_proj.weight.zero_()
    assert not torch.equal(logits(twin), expected) and torch.equal(logits(model), expected)


def test_a_copy_saves_itself(model, checkpoint, tmp_path):
    """`save_pretrained` is set on the model itself, so a copy must not have the original's."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.norm.weight.mul_(2)
    twin.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(twin))
    assert not torch.equal(logits(twin), logits(model))


def test_nothing_is_pickled(original, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    for module, names in (
        (torch, ("load", "save")),
        (pickle, ("load", "loads", "dump", "dumps", "Unpickler")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    model = rounded(original)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    assert {file.suffix for file in tmp_path.iterdir()} <= {".json", ".safetensors", ".md"}


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compile(model, fresh_compiler):
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(logits(compiled), expected)


def test_generate_with_a_static_cache(model):
    expected = model.generate(TOKENS, **GREEDY)
    assert torch.equal(model.generate(TOKENS, cache_implementation="static", **GREEDY), expected)


def test_assisted_decoding(model, original):
    """Greedy decoding gives the same tokens whoever drafts them, so a quantized model may draft or be drafted for."""
    unquantized = AutoModelForCausalLM.from_pretrained(original)
    prompt = TOKENS[:1]
    for target, assistant in ((unquantized, model), (model, unquantized), (model, copy.deepcopy(model))):
        expected = target.generate(prompt, **GREEDY)
        assert torch.equal(target.generate(prompt, assistant_model=assistant, **GREEDY), expected)

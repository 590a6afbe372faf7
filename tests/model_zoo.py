"""Tiny random models of many families, made from configs: no network, fixed seeds, a fraction of a second each.

`FAMILIES` are the text-only causal LMs, `EXPERTS` those with experts in 3-D parameters; `OTHERS` are models that only selection and block finding must cope with.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BloomConfig,
    CLIPVisionConfig,
    CohereConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RwkvConfig,
    T5Config,
)

VOCAB = 256
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_LAYERS = {"sliding_window": 8, "num_hidden_layers": 3}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def _llama(**changes: object) -> LlamaConfig:
    return LlamaConfig(**{**_COMMON, **changes})


_CONFIGS = {
    # Tied embeddings; o_proj reads 5 * 32 = 160 features, not hidden_size.
    "llama": lambda: _llama(
        hidden_size=80,
        intermediate_size=160,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
    ),
    # 144 = 9 * 16 as SmolLM2's 576 = 9 * 64: a multiple of 16 and of no larger power of two.
    "llama-144": lambda: _llama(
        hidden_size=144, intermediate_size=288, num_attention_heads=9, num_key_value_heads=3
    ),
    # 200 = 12.5 * 16: no format takes down_proj.
    "llama-200": lambda: _llama(intermediate_size=200),
    "qwen2": lambda: Qwen2Config(**{**_COMMON, "tie_word_embeddings": True}),
    # Three heads do not divide a hidden size of 80 (Llama's config refuses that).
    "qwen3": lambda: Qwen3Config(
        **{**_COMMON, "hidden_size": 80, "num_attention_heads": 3, "num_key_value_heads": 1}
    ),
    "mistral": lambda: MistralConfig(**{**_COMMON, "sliding_window": 8}),
    "gemma3": lambda: Gemma3TextConfig(
        **{**_COMMON, **_LAYERS, "tie_word_embeddings": True, "query_pre_attn_scalar": 16},
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: Phi3Config(**_COMMON),
    "gpt_neox": lambda: GPTNeoXConfig(**_COMMON, use_parallel_residual=True),
    "opt": lambda: OPTConfig(**{**_COMMON, "tie_word_embeddings": True}, ffn_dim=128, word_embed_proj_dim=64),
    # Blocks that return tuples, and a mask-like bias that every block receives.
    "bloom": lambda: BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, pad_token_id=0),
    # One layer norm feeds attention and MLP.
    "cohere": lambda: CohereConfig(**_COMMON, logit_scale=1.0),
    # Its output head is the attribute "decoder".
    "modernbert_decoder": lambda: ModernBertDecoderConfig(
        **_COMMON, cls_token_id=1, sep_token_id=2, local_attention=16
    ),
    # Its blocks return three values, which the model unpacks.
    "rwkv": lambda: RwkvConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, context_length=128),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_positions=128, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "mixtral": lambda: MixtralConfig(**_COMMON, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_COMMON, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=64
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_COMMON, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "olmoe": lambda: OlmoeConfig(
        **{**_COMMON, "intermediate_size": 32}, num_experts=8, num_experts_per_tok=2
    ),
    # One dense layer, then experts beside shared ones.
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**_COMMON, "num_key_value_heads": 4, "num_hidden_layers": 3},
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    # Transposed, with biases, gate and up taking turns.
    "gpt_oss": lambda: GptOssConfig(
        **{**_COMMON, "intermediate_size": 64},
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
    ),
    # Every expert is given every token, times its weight; every other layer is dense.
    "llama4": lambda: Llama4TextConfig(
        **{**_COMMON, "intermediate_size": 64},
        intermediate_size_mlp=128,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        attention_chunk_size=32,
    ),
    "llava": lambda: LlavaConfig(
        text_config=_llama(),
        vision_config=CLIPVisionConfig(**_VISION),
        image_token_index=3,
        image_seq_length=4,
    ),
    "bert": lambda: BertConfig(**{**_COMMON, "tie_word_embeddings": True}),
    "t5": lambda: T5Config(
        vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, tie_word_embeddings=False
    ),
}
_CLASSES = {"llava": AutoModelForImageTextToText, "bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}

EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "llama4"]
OTHERS = ["bloom", "cohere", "modernbert_decoder", "rwkv", "gpt2", *EXPERTS, *_CLASSES]
FAMILIES = [family for family in _CONFIGS if family not in OTHERS]


def tiny_config(family: str) -> PretrainedConfig:
    """A new config of one family."""
    return _CONFIGS[family]()


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model in evaluation mode whose weights, biases and norms are all random, so that no term is hidden by a zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = skeleton(family, "cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * 0.1)
    return model.to(dtype).eval()


def skeleton(family: str, device: str = "meta") -> PreTrainedModel:
    """The model as transformers builds it before it loads weights."""
    with torch.device(device):
        return _CLASSES.get(family, AutoModelForCausalLM).from_config(tiny_config(family))


def tiny_tokens(batch: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    """int64 [batch, length] tokens without special ids; longer than every sliding window of the zoo."""
    return torch.randint(4, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def linear_names(module: nn.Module) -> list[str]:
    """Names of every nn.Linear (subclasses too) in module order."""
    return [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]


def save_with_tokenizer(directory: Path, max_position_embeddings: int = 64) -> None:
    """Write a tiny bf16 Llama with a byte-level tokenizer, as a user would have it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=80,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=max_position_embeddings,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)

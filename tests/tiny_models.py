"""Tiny models made in code: real architectures, random weights, a character tokenizer; no download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXACT = {"TRITON_F32_DEFAULT": "ieee"}
"""For a server whose float32 is compared with another's: Triton's attention multiplies it as TF32 unless told not to.
Seen on an H100, over all tokens of the dense model: 3.5e-4 nats from the reference with TF32, 7.7e-7 without."""
ALPHABET = "0123456789+-*=() abcdefghijklmnopqrstuvwxyz?.,\n"


def save_tokenizer(folder: Path) -> int:
    """Write a character tokenizer and return the size of its vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *ALPHABET]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return len(words)


def make_qwen3(folder: Path, seed: int = 0) -> Path:
    """A dense Qwen3 of two layers with random weights, as float32 safetensors."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    vocabulary = save_tokenizer(folder)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=256,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=8192, tie_word_embeddings=False,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    _save(Qwen3ForCausalLM(config), folder)
    return folder


def make_qwen3_moe(folder: Path, seed: int = 0, head_dim: int = 32) -> Path:
    """A Qwen3-MoE of two layers and eight experts with random weights, as float32 safetensors."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    vocabulary = save_tokenizer(folder)
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=256, moe_intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim,
        num_experts=8, num_experts_per_tok=2, decoder_sparse_step=1, norm_topk_prob=True,
        max_position_embeddings=8192, tie_word_embeddings=False,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    _save(Qwen3MoeForCausalLM(config), folder)
    return folder


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Write float32 weights, with norms that differ: ones would hide an engine that does not load them."""
    import torch

    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.normal_(1.0, 0.1)
    model.to(torch.float32).save_pretrained(folder)

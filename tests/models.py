"""Tiny models of many architectures, built from their configs without any download.

Hidden sizes leave ragged groups: 96 and 192 are no multiples of 128, 80 is none of 32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 97


def _text(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 11), generator=generator)}


def _images(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}


def _decoder(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "max_position_embeddings": 64,
        **more,
    }


def llama(**more: Any) -> nn.Module:
    """Llama with an untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_decoder(tie_word_embeddings=False, **more)))


def qwen3(**more: Any) -> nn.Module:
    """Qwen3 with a tied head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_decoder(tie_word_embeddings=True, **more)))


def gemma2() -> nn.Module:
    """Gemma 2, tied."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**_decoder(query_pre_attn_scalar=20)))


def gemma3() -> nn.Module:
    """Gemma 3, text, tied."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**_decoder(query_pre_attn_scalar=20, sliding_window=8)))


def opt() -> nn.Module:
    """OPT with projections around its layers, tied."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        ffn_dim=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=80,
    )
    return OPTForCausalLM(config)


def gpt2() -> nn.Module:
    """GPT-2: Conv1D, tied."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=96, n_layer=1, n_head=4, n_positions=64))


def bloom() -> nn.Module:
    """BLOOM, tied."""
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=96, n_layer=1, n_head=4))


def bert(**more: Any) -> nn.Module:
    """BERT with its masked-language head, tied."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        **more,
    )
    return BertForMaskedLM(config)


def bart() -> nn.Module:
    """BART: encoder and decoder share their embedding with the head."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=96,
        encoder_ffn_dim=192,
        decoder_ffn_dim=192,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=64,
    )
    return BartForConditionalGeneration(config)


def vit() -> nn.Module:
    """ViT: its patches come from a convolution; it has no output embedding."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_labels=5,
    )
    return ViTForImageClassification(config)


def mixtral() -> nn.Module:
    """Mixtral: fused experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**_decoder(num_local_experts=4, num_experts_per_tok=2)))


def qwen3_moe() -> nn.Module:
    """Qwen3-MoE: fused experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    more = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 80, "decoder_sparse_step": 1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_decoder(tie_word_embeddings=False, **more)))


def gpt_oss() -> nn.Module:
    """gpt-oss: transposed, interleaved experts with biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(
        GptOssConfig(**_decoder(num_local_experts=4, num_experts_per_tok=2, sliding_window=8))
    )


def llama4() -> nn.Module:
    """Llama 4, text: transposed experts that get sorted tokens."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    more = {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 192,
        "interleave_moe_layer_step": 1,
    }
    return Llama4ForCausalLM(Llama4TextConfig(**_decoder(tie_word_embeddings=False, **more)))


def nemotron_h() -> nn.Module:
    """Nemotron-H: experts without a gate, and state-space layers."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    config = NemotronHConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=192,
        layers_block_type=["attention", "moe"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=80,
        moe_shared_expert_intermediate_size=80,
        n_group=1,
        topk_group=1,
    )
    return NemotronHForCausalLM(config)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    build.__name__: build
    for build in (
        llama, qwen3, gemma2, gemma3, opt, gpt2, bloom, bert, bart, vit, mixtral, qwen3_moe, gpt_oss, llama4,
        nemotron_h,
    )
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A model in eval mode with random weights: norms and biases are random too, so that each matters."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                # Student-t(4): a tail of outliers, as in trained models.
                tail = torch.distributions.Chi2(4.0).sample(parameter.shape) / 4.0
                parameter.copy_(0.06 * torch.randn_like(parameter) / tail.sqrt())
    return model.to(dtype).eval()


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """A batch that the model's forward takes."""
    return _images(model) if type(model).__name__.startswith("ViT") else _text(model)


def logits(model: nn.Module) -> Tensor:
    """The model's logits on `inputs`, without gradients."""
    with torch.no_grad():
        return model(**inputs(model)).logits


def plain(columns: int = 96, hidden: int = 200) -> nn.Sequential:
    """A model without transformers: two linear layers with a norm between."""
    return nn.Sequential(
        nn.Linear(columns, hidden), nn.GELU(), nn.LayerNorm(hidden), nn.Linear(hidden, 33, bias=False)
    ).eval()

"""Both tools on a trained model."""

from __future__ import annotations

import torch

from olive.eval import inject_outliers, perplexity
from tests.house.layers import ROOT

BUNDLED = ROOT / "examples" / "tiny_llama"
WINDOW = 256


def test_injection_keeps_the_perplexity() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    text = (BUNDLED / "heldout.txt").read_text()[:6_000]
    before = perplexity(model, text, tokenizer=tokenizer, window=WINDOW)
    injection = inject_outliers(model)
    after = perplexity(model, text, tokenizer=tokenizer, window=WINDOW)
    assert 1 < before < 40
    assert abs(after - before) <= 1e-5 * before
    assert [norm.name for norm in injection.norms] == [
        f"model.layers.{layer}.{name}_layernorm" for layer in range(4) for name in ("input", "post_attention")
    ]
    assert [other.name for other in injection.left_out] == ["model.norm"]

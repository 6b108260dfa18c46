"""torch.compile of a whole quantized model with inductor: one graph, the eager model's logits."""

import pytest
import torch
import transformers

import olive

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
def test_a_quantized_llama_compiles_to_one_graph():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    model = olive.quantize(transformers.LlamaForCausalLM(config).eval())
    tokens = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        got = torch.compile(model, fullgraph=True)(tokens, use_cache=False).logits
    # Our operators give the same bits; inductor rounds the norms between them less often than eager does.
    assert bool(((got - expected).abs() <= 2e-6 * expected.abs().max()).all())

"""`olive.eval.inject_outliers` on real architectures: same function, large channels, nothing half-changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import olive
from olive.eval import OutlierInjection, inject_outliers
from olive.eval.edits import Edit
from tests import models

LAYER = "model.layers.0."
ATTENTION = tuple(f"{LAYER}self_attn.{key}_proj" for key in "qkv")
GATED = (f"{LAYER}mlp.gate_proj", f"{LAYER}mlp.up_proj")
MOE = (f"{LAYER}mlp.gate", f"{LAYER}mlp.experts")
INPUT, POST = f"{LAYER}input_layernorm", f"{LAYER}post_attention_layernorm"
GEMMA = {INPUT: ATTENTION, f"{LAYER}pre_feedforward_layernorm": GATED}
HEAD = {"model.norm": ("lm_head",)}
OPT = "model.decoder.layers.0."
VIT = "vit.layers.0."
# Norms and who reads them; all other norms are left out.
READERS: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": {INPUT: ATTENTION, POST: GATED, **HEAD},
    "qwen3": {INPUT: ATTENTION, POST: GATED},
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "opt": {
        "model.decoder.final_layer_norm": ("model.decoder.project_out",),
        f"{OPT}self_attn_layer_norm": tuple(f"{OPT}self_attn.{key}_proj" for key in "qkv"),
        f"{OPT}final_layer_norm": (f"{OPT}fc1",),
    },
    "gpt2": {
        "transformer.h.0.ln_1": ("transformer.h.0.attn.c_attn",),
        "transformer.h.0.ln_2": ("transformer.h.0.mlp.c_fc",),
    },
    "bloom": {
        "transformer.h.0.input_layernorm": ("transformer.h.0.self_attention.query_key_value",),
        "transformer.h.0.post_attention_layernorm": ("transformer.h.0.mlp.dense_h_to_4h",),
    },
    "bert": {"bert.encoder.layer.0.output.LayerNorm": ("cls.predictions.transform.dense",)},
    "vit": {
        f"{VIT}layernorm_before": tuple(f"{VIT}attention.{key}_proj" for key in "qkv"),
        f"{VIT}layernorm_after": (f"{VIT}mlp.fc1",),
        "vit.layernorm": ("classifier",),
    },
    "mixtral": {INPUT: ATTENTION, POST: MOE, **HEAD},
    "qwen3_moe": {INPUT: ATTENTION, POST: MOE, **HEAD},
    "gpt_oss": {INPUT: ATTENTION, POST: (f"{LAYER}mlp.router", f"{LAYER}mlp.experts"), **HEAD},
    "llama4": {INPUT: ATTENTION, **HEAD},
    "nemotron_h": {
        "model.layers.0.norm": tuple(f"model.layers.0.mixer.{key}_proj" for key in "qkv"),
        "model.layers.1.norm": tuple(
            f"model.layers.1.mixer.{key}" for key in ("gate", "experts", "shared_experts.up_proj")
        ),
        "model.norm_f": ("lm_head",),
    },
}
TIED = "read by {}, whose weight is tied to {}"
# Some of those that are left out, with the reasons.
REASONS = {
    "qwen3": {
        f"{LAYER}self_attn.q_norm": f"read by aten.mul in {LAYER}self_attn",
        "model.norm": TIED.format("lm_head", "model.embed_tokens.weight"),
    },
    "gemma2": {POST: "read by aten.add in model.layers.0"},
    "gpt2": {"transformer.ln_f": TIED.format("lm_head", "transformer.wte.weight")},
    "bert": {
        "bert.embeddings.LayerNorm": "read by aten.add in bert.encoder.layer.0.attention.output",
        "bert.encoder.layer.0.attention.output.LayerNorm": "read by aten.add in bert.encoder.layer.0.output",
    },
    "llama4": {POST: f"read by aten.repeat in {LAYER}feed_forward"},
}
every_architecture = pytest.mark.parametrize("name", sorted(READERS))


def inject(model: nn.Module, **options: Any) -> OutlierInjection:
    return inject_outliers(model, sample=models.inputs(model), **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def reader_inputs(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Largest magnitude of each channel in what the modules of these names get."""
    found: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            found[name] = given.detach().abs().flatten(0, -2).amax(0)

        return hook

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(remember(name), with_kwargs=True)
        for name in names
    ]
    models.logits(model)
    for hook in hooks:
        hook.remove()
    return found


@every_architecture
def test_outputs_stay_and_exactly_the_channels_grow(name: str) -> None:
    model = models.build(name)
    names = [reader for readers in READERS[name].values() for reader in readers]
    before, inputs = models.logits(model), reader_inputs(model, names)
    injection = inject(model, factor=50.0, share=0.03)
    after = models.logits(model)
    # Float32 rounds the changed weights: 1e-6 is seen here.
    assert bool(((after - before).abs() <= 1e-5 * before.abs().max()).all())
    assert {norm.name: norm.readers for norm in injection.norms} == READERS[name]
    grown = reader_inputs(model, names)
    for norm in injection.norms:
        assert len(norm.channels) == round(0.03 * 96) == 3
        expected = torch.ones(96)
        expected[list(norm.channels)] = 50.0
        for reader in norm.readers:
            torch.testing.assert_close(grown[reader], inputs[reader] * expected, rtol=1e-3, atol=1e-4)
            assert int(grown[reader].argmax()) in norm.channels
            assert float(grown[reader].max() / grown[reader].median()) > 15
    left_out = {other.name: other.reason for other in injection.left_out}
    assert REASONS.get(name, {}).items() <= left_out.items()
    assert not {norm.name for norm in injection.norms} & set(left_out)


@every_architecture
def test_only_norms_and_their_readers_change(name: str) -> None:
    model = models.build(name)
    before = state(model)
    injection = inject(model)
    touched = {norm.name for norm in injection.norms} | {r for norm in injection.norms for r in norm.readers}
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.rpartition(".")[0] for key in changed} == touched
    assert not any(key.endswith(("down_proj", "down_proj.weight")) for key in changed)


def test_the_same_channels_in_every_norm_and_others_with_another_seed() -> None:
    draws = [inject(models.build("llama"), share=0.1, seed=seed) for seed in (0, 0, 1)]
    channels = [{norm.channels for norm in draw.norms} for draw in draws]
    assert all(len(found) == 1 for found in channels)
    assert channels[0] == channels[1] != channels[2]
    assert draws[0] == draws[1]


def test_at_least_one_channel() -> None:
    assert {len(norm.channels) for norm in inject(models.build("llama"), share=1e-6).norms} == {1}
    assert {len(norm.channels) for norm in inject(models.build("llama"), share=1.0).norms} == {96}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_power_of_two_changes_no_bit_of_a_16_bit_models_output(name: str, dtype: torch.dtype) -> None:
    model = models.build(name, dtype)
    before = models.logits(model)
    assert len(inject(model, factor=32.0).norms) == len(READERS[name])
    after = models.logits(model)
    if dtype == torch.bfloat16:
        assert torch.equal(before, after)
    else:  # divided weights may be subnormal
        assert bool(((after - before).abs() <= 1e-2 * before.abs().max()).all())


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
def test_other_factors_only_round_in_bfloat16(name: str) -> None:
    model = models.build(name, torch.bfloat16)
    before = models.logits(model).float()
    assert len(inject(model).norms) == len(READERS[name])
    error = (models.logits(model).float() - before).norm() / before.norm()
    assert float(error) <= 2e-2  # two roundings of 2^-9 at most, and what the layers make of them


def test_the_sample_may_be_tokens_or_none() -> None:
    tokens = torch.arange(3, 20)[None]
    for sample in (None, tokens, {"input_ids": tokens}):
        model = models.build("llama")
        assert {n.name: n.readers for n in inject_outliers(model, sample=sample).norms} == READERS["llama"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_adapters_are_readers_too() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(models.build("llama"), config).eval()
    before = models.logits(model)
    norm = next(norm for norm in inject(model).norms if norm.name.endswith(INPUT))
    assert [name.rpartition("q_proj.")[2] for name in norm.readers[:2]] == ["base_layer", "lora_A.default"]
    assert bool(((models.logits(model) - before).abs() <= 1e-5 * before.abs().max()).all())


def test_an_injected_model_quantizes() -> None:
    model = models.build("llama")
    inject(model)
    before = models.logits(model)
    error = (models.logits(olive.quantize(model)) - before).norm() / before.norm()
    assert float(error) < 0.3


def test_post_norm_models_are_refused_with_the_reasons() -> None:
    model = models.build("bart")
    before = state(model)
    message = (
        r"model: expected a norm that only linear layers read, got none \("
        r"model.encoder.layers.0.self_attn_layer_norm: read by aten.add in model.encoder.layers.0; "
        r"model.encoder.layers.0.final_layer_norm: its output is an output of the model; "
    )
    with pytest.raises(ValueError, match=message):
        inject(model)
    assert same(state(model), before)


@contextmanager
def failing_at(call: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """`Edit.apply` is interrupted in the middle of its work when it is called for the `call`-th time."""
    calls: list[int] = []
    apply = Edit.apply

    def interrupted(self: Edit, factor: float) -> None:
        calls.append(len(calls))
        apply(self, factor)
        if len(calls) == call:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Edit, "apply", interrupted)
        yield calls


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "mixtral"])
def test_the_model_is_as_it_was_after_ctrl_c(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build(name).train()
    before, hooks = state(model), [len(module._forward_hooks) for module in model.modules()]
    with failing_at(0, monkeypatch) as calls:
        inject(models.build(name))
    for call in (1, 2, len(calls) // 2, len(calls) // 2 + 1, len(calls)):
        with failing_at(call, monkeypatch), pytest.raises(KeyboardInterrupt):
            inject(model)
        assert same(state(model), before), call
    assert all(module.training for module in model.modules())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("run", [1, 2])
def test_the_model_is_as_it_was_if_it_fails_itself(run: int) -> None:
    model = models.build("llama")
    before, runs = state(model), 0

    def fail(*args: object) -> None:
        nonlocal runs
        runs += 1
        if runs == run:
            raise RuntimeError("out of memory")

    hook = model.model.norm.register_forward_hook(fail)  # type: ignore[union-attr,operator]
    with pytest.raises(RuntimeError, match="out of memory"):
        inject(model)
    assert runs == run and same(state(model), before)
    hook.remove()
    assert len(inject(model).norms) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"factor": 1.0}, ValueError, "factor: expected a finite number above 1, got 1.0"),
        ({"factor": float("inf")}, ValueError, "factor: expected a finite number above 1, got inf"),
        ({"share": 0.0}, ValueError, "share: expected a number above 0, at most 1, got 0.0"),
        ({"share": 1.5}, ValueError, "share: expected a number above 0, at most 1, got 1.5"),
        ({"seed": 0.5}, TypeError, "seed: expected an int, got float"),
        ({"sample": "text"}, TypeError, "sample: expected a tensor or a dict of inputs, got str"),
        ({"model": None}, TypeError, "model: expected a torch.nn.Module, got NoneType"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"model": models.build("llama"), **options}
    with pytest.raises(error, match=message):
        inject_outliers(arguments.pop("model"), **arguments)


def test_quantized_models_are_refused() -> None:
    model = olive.quantize(models.build("llama"))
    with pytest.raises(ValueError, match="q_proj; inject outliers before quantizing"):
        inject(model)


def test_models_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = models.llama()
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight: .* one on the meta device; load"):
        inject_outliers(model)


def test_models_without_a_vocabulary_need_a_sample() -> None:
    with pytest.raises(ValueError, match=r"sample: expected inputs, because ViTForImageC.* no vocabulary"):
        inject_outliers(models.build("vit"))


def test_broken_models_are_refused() -> None:
    model = models.build("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan  # type: ignore[union-attr,index,operator]
    with pytest.raises(ValueError, match="sample: expected finite outputs of the model, got NaN or Inf"):
        inject(model)

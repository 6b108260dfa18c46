"""Damaged checkpoints: each is an error that names the tensor, none is loaded with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import olive
from olive.config import FORMAT_VERSION
from tests import models

UP = "model.layers.1.mlp.up_proj"
Tensors = dict[str, Tensor]


def edit_tensors(path: Path, change: Callable[[Tensors], object]) -> None:
    file = path / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata)


def edit_config(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    file = path / "config.json"
    values = json.loads(file.read_text())
    change(values["quantization_config"])
    file.write_text(json.dumps(values))


def put(field: str, make: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.{field}"] = make(tensors[f"{UP}.{field}"])

    return change


def spoil_pair(tensors: Tensors) -> None:
    """Two identifiers are no pair, under the pair rule; so the rule bit and the scale's sign go too."""
    tensors[f"{UP}.codes"][5, 0] = 0x88
    tensors[f"{UP}.scale"][5, 0] = tensors[f"{UP}.scale"][5, 0] & 0x7FFE


def first(tensor: Tensor, value: int) -> Tensor:
    tensor[5, 0] = value
    return tensor


Case = tuple[Callable[[Tensors], object], type[Exception], str]
MISSING: dict[str, Case] = {
    f"missing {name}": (
        lambda tensors, name=name: tensors.pop(name),
        ValueError,
        rf"{name}: expected in the checkpoint",
    )
    for name in (f"{UP}.codes", f"{UP}.scale", f"{UP}.codebook", "model.layers.1.self_attn.q_proj.bias")
}
CHANGED: dict[str, tuple[str, Callable[[Tensor], Tensor], type[Exception], str]] = {
    "truncated": ("codes", lambda c: c[:-1], ValueError, r"expected shape \(96, 32\), got \(95, 32\)"),
    "transposed": ("codes", lambda c: c.T, ValueError, r"expected shape \(96, 32\)"),
    "signed codes": ("codes", lambda c: c.view(torch.int8), TypeError, r"expected uint8, got int8"),
    "bfloat16 scale": ("scale", lambda s: s.view(torch.bfloat16), TypeError, r"expected int16, got bfloat16"),
    "float16 scale": ("scale", lambda s: s.to(torch.float16), TypeError, r"expected int16, got float16"),
    "other groups": ("scale", lambda s: s[:, :1], ValueError, r"expected shape \(96, 2\), got \(96, 1\)"),
    "zero scale": (
        "scale",
        lambda s: first(s, 0),
        ValueError,
        r"expected finite non-zero scales.* at \[5, 0\]",
    ),
    "unsigned codebook": ("codebook", lambda c: c.view(torch.uint8), TypeError, r"expected int8, got uint8"),
    "short codebook": ("codebook", lambda c: c[:16], ValueError, r"expected shape \(32,\), got \(16,\)"),
}
CASES: dict[str, Case] = {
    **MISSING,
    **{
        case: (put(field, make), error, rf"{UP}\.{field}: {message}")
        for case, (field, make, error, message) in CHANGED.items()
    },
    "no codebook": (
        put("codebook", lambda c: c * 0),
        ValueError,
        rf"'{UP}\.codebook', normal: expected 8 rising",
    ),
    "invalid pair": (lambda t: spoil_pair(t), ValueError, rf"{UP}\.codes: .* got byte 0x88 at \[5, 0\]"),
}


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_damaged_tensor_is_named(stored: Path, case: str, ignore: bool) -> None:
    change, error, message = CASES[case]
    edit_tensors(stored, change)
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(stored, ignore_mismatched_sizes=ignore)


def test_experts_are_checked_too(tmp_path: Path) -> None:
    olive.quantize(models.build("mixtral")).save_pretrained(tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"

    def change(tensors: Tensors) -> None:
        tensors[f"{name}.scale"][2, 4, 0] = 0

    edit_tensors(tmp_path, change)
    with pytest.raises(
        ValueError, match=rf"{name}\.scale: expected finite non-zero .* at \[4, 0\] of expert 2"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({f"{name}.codes": tensors[f"{name}.codes"][:3]}))
    with pytest.raises(ValueError, match=rf"{name}\.codes: expected shape \(4, 96, 96\), got \(3, 96, 96\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_newer_format_is_refused(stored: Path) -> None:
    edit_config(stored, lambda values: values.update(format_version=FORMAT_VERSION + 1))
    with pytest.raises(ValueError, match=r"format_version: expected at most .* upgrade"):
        AutoModelForCausalLM.from_pretrained(stored)


def test_a_truncated_file_is_refused(stored: Path) -> None:
    file = stored / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a complete safetensors file"):
        AutoModelForCausalLM.from_pretrained(stored)


def test_a_file_of_another_save_is_refused(stored: Path) -> None:
    edit_config(stored, lambda values: values.update(save_id="another"))
    with pytest.raises(
        ValueError, match=r"model\.safetensors: expected a file of save another.* into an empty folder"
    ):
        AutoModelForCausalLM.from_pretrained(stored)


def test_a_file_without_save_id_is_refused_only_if_the_config_names_one(stored: Path) -> None:
    file = stored / "model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"got one of save None"):
        AutoModelForCausalLM.from_pretrained(stored)
    edit_config(stored, lambda values: values.update(save_id=None))
    AutoModelForCausalLM.from_pretrained(stored)


def test_weights_that_the_config_does_not_list(stored: Path) -> None:
    edit_config(stored, lambda values: values.update(sqnr_db={}))
    with pytest.raises(
        ValueError, match=r"sqnr_db: expected the names of this model's quantized weights, got 'none'"
    ):
        AutoModelForCausalLM.from_pretrained(stored)


def test_codes_that_the_config_does_not_list(stored: Path) -> None:
    edit_config(stored, lambda values: values["sqnr_db"].pop(f"{UP}.weight"))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=rf"{UP}\.codes: expected its weight in .*sqnr_db"):
        AutoModelForCausalLM.from_pretrained(stored)


def test_biases_of_experts_are_checked_too(tmp_path: Path) -> None:
    olive.quantize(models.build("gpt_oss")).save_pretrained(tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj_bias"
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.int32)}))
    with pytest.raises(TypeError, match=rf"{name}: expected float32 or float16 or bfloat16, got I32"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"{name}: expected in the checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_listed_weight_that_cannot_be_quantized(stored: Path) -> None:
    edit_config(stored, lambda values: values["sqnr_db"].update({"model.embed_tokens.weight": None}))  # type: ignore[attr-defined]
    with pytest.raises(
        ValueError, match=r"model\.embed_tokens\.weight: expected a weight that can be quantized"
    ):
        AutoModelForCausalLM.from_pretrained(stored)


def test_half_of_the_experts_listed(tmp_path: Path) -> None:
    olive.quantize(models.build("mixtral")).save_pretrained(tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"
    edit_config(tmp_path, lambda values: values["sqnr_db"].pop(name))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=rf"sqnr_db: expected {name} besides the other weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path)

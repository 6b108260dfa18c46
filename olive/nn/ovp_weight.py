"""`OVPWeight`: one weight [N, K], or a stack [E, N, K], in outlier-victim pairs, as a module.

A state dict always holds the canonical layout (`codes`, `scale`, `codebook` of `olive.formats`). Where a
device's kernels have a packed layout the same parameters hold that instead: the weight is in memory once.

The module also knows how its input is quantized. Which operator multiplies follows from values (a codebook's
levels, a static scale): it is decided when tensors are set or loaded, so a call reads no tensor to find out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from olive import ops
from olive.formats import (
    PAPER,
    PER_CHANNEL,
    ActivationFormat,
    Codebook,
    codes_shape,
    get_codebook,
    ovp4_validate,
    ovp8_validate,
    scale_shape,
    unpack_scale,
)
from olive.formats.activations import MAX_INT32_TERMS, integer_block
from olive.nn.activation_figures import ActivationFigures
from olive.nn.origin import empty, frozen

# Parameters that stand for a float weight and its input; the last two only with static scales.
WEIGHT_TENSORS = ("codes", "scale", "codebook")
ACTIVATION_TENSORS = ("activation_scale", "activation_codebook")


def check_activation_tensors(scale: Tensor, codebook: Tensor | None, name: str) -> None:
    """Check the stored tensors of a static activation format.

    Args:
        scale: int16 [1]: a positive finite stored scale without rule bit, or 0 for "dynamic, per token".
        codebook: int8 [32] of "ovp4", else None.
        name: prefix of the tensors' names in errors.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a wrong shape, a bad scale, or no codebook.
    """
    if scale.dtype != torch.int16:
        raise TypeError(f"{name}.activation_scale: expected torch.int16, got {scale.dtype}")
    if tuple(scale.shape) != (1,):
        raise ValueError(f"{name}.activation_scale: expected shape (1,), got {tuple(scale.shape)}")
    value, plain = (part.item() for part in unpack_scale(scale))
    # Below the smallest normal number its reciprocal is infinite.
    if int(scale) and not (2.0**-126 <= value < float("inf") and not plain):
        raise ValueError(
            f"{name}.activation_scale: expected a positive finite scale without rule bit, or 0, "
            f"got pattern {int(scale) & 0xFFFF:04X}"
        )
    if codebook is not None:
        Codebook.from_tensor(codebook, f"{name}.activation_codebook")


def _is_int8(codebook: Tensor | None) -> bool:
    return codebook is None or int(codebook.detach()[:16].view(torch.uint8).max()) <= 127


class OVPWeight(nn.Module):
    """Parameters of one quantized weight, or of a stack of weights of one shape (experts).

    Args:
        out_features: N.
        in_features: K.
        group_size: -1 per channel, 0 per tensor, else columns per group.
        bits: per code, 4 or 8.
        activations: how the input is quantized before it is multiplied; None = it is not.
        experts: None for one weight; E for a stack, which adds a leading dimension to codes and scale.
        transposed: whether the float parameter it stands for is laid out [..., K, N], as in transformers'
            `Conv1D`; codes are [N, K] in either case.
        device: where the empty parameters are made.
        dtype: of the float parameter; `.to(dtype)` changes it, codes and scale stay as they are.

    Attributes:
        codes: uint8 [N, ceil(K / 2)], or packed (`olive.ops.packed`); [N, 2 ceil(K / 2)] for 8 bits; with
            [E] before it in a stack.
        scale: int16 [N, G], or packed; likewise.
        codebook: int8 [32]; None for 8 bits.
        activation_scale: int16 [1], of static activations, one for a whole stack; 0 = none is known, scales
            are dynamic, one per token. Else None.
        activation_codebook: int8 [32] of "ovp4": a parameter with static scales, where it can depend on data,
            else a buffer that is not saved. Else None.
        input_rotation: columns of the blocks in which the input is rotated by a Hadamard matrix H before
            anything else (`olive.ops.block_hadamard`); 0 = it is not. The codes stand for W H then, so that
            (x H) (W H)^T = x W^T. A state dict does not hold it: it follows from the `QuantConfig`.
        sqnr_db: signal-to-quantization-noise ratio of the weight in dB; None if not known.
        activation_figures: how a calibration sample survives; None if there was none.
    """

    codebook: nn.Parameter | None
    activation_scale: nn.Parameter | None
    activation_codebook: Tensor | None
    input_rotation: int = 0

    def __init__(
        self,
        out_features: int,
        in_features: int,
        group_size: int,
        *,
        bits: int = 4,
        activations: ActivationFormat | None = None,
        experts: int | None = None,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.group_size = out_features, in_features, group_size
        self.bits, self.activations = bits, activations
        self.experts, self.transposed = experts, transposed
        self.dtype = dtype or torch.get_default_dtype()
        self.sqnr_db: float | None = None
        self.activation_figures: ActivationFigures | None = None
        codes, scale = self._canonical_shapes()
        self.codes = empty(codes, torch.uint8, device)
        self.scale = empty(scale, torch.int16, device)
        self.register_parameter("codebook", empty((32,), torch.int8, device) if bits == 4 else None)
        self._empty_activations()
        self.refresh_activations_()

    def _empty_activations(self) -> None:
        static = self.activations is not None and self.activations.is_static
        scale = frozen(torch.zeros(1, dtype=torch.int16, device=self.codes.device)) if static else None
        self.register_parameter("activation_scale", scale)
        book = self._named_activation_codebook()
        if static:
            self.register_parameter("activation_codebook", None if book is None else frozen(book))
        else:
            self.register_buffer("activation_codebook", book, persistent=False)

    def _named_activation_codebook(self) -> Tensor | None:
        """Tables of the format's codebook; of int4 where data decides, until they do."""
        if self.activations is None or self.activations.name != "ovp4":
            return None
        name = self.activations.codebook
        with torch.device("cpu"):  # whatever the caller's default is, the meta device among others
            table = get_codebook("int4" if name == PAPER else name).tensor()
        return table.to(self.codes.device)

    def refresh_activations_(self) -> None:
        """Decide anew how the input is quantized; needed after parameters were assigned directly."""
        self._format, self._integer = self.activations, False
        if self._format is None or self.codes.is_meta:
            return
        if self._format.is_static:
            assert self.activation_scale is not None
            if int(self.activation_scale) == 0:
                self._format = replace(self._format, group_size=PER_CHANNEL)
        else:  # the buffer may have been on the meta device until now
            self.activation_codebook = self._named_activation_codebook()
        block = integer_block(self.in_features, self.group_size, self._format.group_size)
        self._integer = (
            self.bits == 4
            and self._format.name != "ovp8"
            and block <= MAX_INT32_TERMS
            and _is_int8(self.codebook)
            and _is_int8(self.activation_codebook)
        )

    @property
    def activation_format(self) -> ActivationFormat | None:
        """How the input is quantized: `activations`, or per token where no static scale is known."""
        return self._format

    def _canonical_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        stack = () if self.experts is None else (self.experts,)
        codes = codes_shape(self.out_features, self.in_features, self.bits)
        scale = scale_shape(self.out_features, self.in_features, self.group_size)
        return (*stack, *codes), (*stack, *scale)

    @property
    def is_packed(self) -> bool:
        """Whether codes and scale are in the backend's layout."""
        return self.codes.dim() == (3 if self.experts is None else 4)

    @property
    def quantized_values(self) -> int:
        """How many float values the codes stand for."""
        return (self.experts or 1) * self.out_features * self.in_features

    def set_(self, codes: Tensor, scale: Tensor, codebook: Tensor | None = None) -> None:
        """Take tensors in the canonical layout as the weight; nothing is copied.

        Args:
            codes, scale: as above.
            codebook: int8 [32]; None for 8 bits.

        Raises:
            TypeError: a tensor of another dtype.
            ValueError: a tensor of another shape.
        """
        if (codebook is None) != (self.bits == 8):
            wanted, found = ("none", "one") if self.bits == 8 else ("one", "none")
            raise ValueError(f"codebook: expected {wanted} for {self.bits} bits, got {found}")
        shapes = self._canonical_shapes()
        expected = [("codes", codes, torch.uint8, shapes[0]), ("scale", scale, torch.int16, shapes[1])]
        if codebook is not None:
            expected.append(("codebook", codebook, torch.int8, (32,)))
        for name, tensor, dtype, shape in expected:
            if tensor.dtype != dtype:
                raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        self.codes, self.scale = frozen(codes), frozen(scale)
        self.codebook = None if codebook is None else frozen(codebook)
        self.refresh_activations_()

    def set_activations_(self, scale: Tensor, codebook: Tensor | None = None) -> None:
        """Take what calibration found as the static scale of the input.

        Args:
            scale: int16 [1], stored form; 0 = none is known.
            codebook: int8 [32] of "ovp4", else None.

        Raises:
            TypeError: a tensor of another dtype.
            ValueError: the format is not static, a wrong shape, a bad scale, or no codebook.
        """
        if self.activations is None or not self.activations.is_static:
            raise ValueError("scale: expected a module with static activations, got one without")
        if (codebook is None) == (self.activations.name == "ovp4"):
            wanted = "one" if codebook is None else "none"
            raise ValueError(f"codebook: expected {wanted} for activations {self.activations.name!r}")
        check_activation_tensors(scale, codebook, "weight")
        self.activation_scale = frozen(scale)
        self.activation_codebook = None if codebook is None else frozen(codebook)
        self.refresh_activations_()

    def _relayout(self, convert: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        codes, scale = self.codes.detach(), self.scale.detach()
        if self.experts is None:
            return convert(codes, scale)
        pairs = [convert(codes[e], scale[e]) for e in range(self.experts)]
        return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])

    def _pack_one(self, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        packed: tuple[Tensor, Tensor] = ops.ovp_pack(codes, scale, self.in_features, self.group_size)
        return packed

    def _unpack_one(self, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        unpacked: tuple[Tensor, Tensor] = ops.ovp_unpack(
            codes, scale, self.out_features, self.in_features, self.group_size
        )
        return unpacked

    def canonical(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The stored form, whatever the layout in memory: codes, scale, codebook (None for 8 bits)."""
        codebook = None if self.codebook is None else self.codebook.detach()
        if not self.is_packed:
            return self.codes.detach(), self.scale.detach(), codebook
        codes, scale = self._relayout(self._unpack_one)
        return codes, scale, codebook

    def pack_(self) -> None:
        """Bring codes and scale into the layout of their device's backend; nothing where there is none."""
        if self.bits == 4 and not self.is_packed and ops.has_packed_layout(self.codes.device):
            codes, scale = self._relayout(self._pack_one)
            self.codes, self.scale = frozen(codes), frozen(scale)

    def unpack_(self) -> None:
        """Bring codes and scale back into the canonical layout."""
        if self.is_packed:
            codes, scale = self._relayout(self._unpack_one)
            self.codes, self.scale = frozen(codes), frozen(scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode the codes to `dtype`: [N, K], or [E, N, K]; rotated still, if the input is."""
        codes, scale, codebook = self.canonical()

        def decode(codes: Tensor, scale: Tensor) -> Tensor:
            size = (self.in_features, self.group_size, dtype)
            decoded: Tensor = (
                ops.ovp8_decode(codes, scale, *size)
                if codebook is None
                else ops.ovp_decode(codes, scale, codebook, *size)
            )
            return decoded

        if self.experts is None:
            return decode(codes, scale)
        return torch.stack([decode(codes[e], scale[e]) for e in range(self.experts)])

    def to_float(self) -> Tensor:
        """The decoded weight as the float parameter was: its layout, the model's dtype, not rotated."""
        if self.input_rotation:
            decoded: Tensor = ops.block_hadamard(self.dequantize(), self.input_rotation).to(self.dtype)
        else:
            decoded = self.dequantize(self.dtype)
        return decoded.transpose(-1, -2).contiguous() if self.transposed else decoded

    def linear(self, input: Tensor, bias: Tensor | None = None, expert: int | None = None) -> Tensor:
        """input [..., K] times the transposed weight (of one expert) plus bias: [..., N], input's dtype.

        With activations the input is quantized first, and rotated before that if it is to be. Integer
        products where every level is an int8, else products in floating point
        (`olive.ops.float_activations`).
        """
        if self.input_rotation:
            input = ops.block_hadamard(input, self.input_rotation)
        codes: Tensor = self.codes
        scale: Tensor = self.scale
        if expert is not None:
            codes, scale = codes[expert], scale[expert]
        size = (bias, self.out_features, self.group_size)
        format = self._format
        if format is None:
            out: Tensor = (
                ops.ovp8_linear(input, codes, scale, *size)
                if self.codebook is None
                else ops.ovp_linear(input, codes, scale, self.codebook, *size)
            )
            return out
        multiply = ops.ovp_linear_quantized if self._integer else ops.linear_float_activations
        product: Tensor = multiply(
            input,
            codes,
            scale,
            self.codebook,
            *size,
            format.name,
            format.group_size,
            format.pairing,
            self.activation_codebook,
            self.activation_scale if format.is_static else None,
        )
        return product

    def extra_repr(self) -> str:
        stack = "" if self.experts is None else f"experts={self.experts}, "
        bits = "" if self.bits == 4 else f", bits={self.bits}"
        activations = f", input_rotation={self.input_rotation}" if self.input_rotation else ""
        if self._format is not None:
            activations += (
                f", activations={self._format.name}, activation_group_size={self._format.group_size}"
            )
        return (
            f"{stack}in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.group_size}{bits}{activations}"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_packed:
            destination[prefix + "codes"], destination[prefix + "scale"], _ = self.canonical()

    def _invalid(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """What is wrong with the stored tensors of this module, or None. Tensors without values pass."""
        held = [
            key for key in (*WEIGHT_TENSORS, *ACTIVATION_TENSORS) if self._parameters.get(key) is not None
        ]
        stored = {key: state_dict.get(prefix + key) for key in held}
        if not all(isinstance(tensor, Tensor) and not tensor.is_meta for tensor in stored.values()):
            return None
        found = {key: tensor.detach() for key, tensor in stored.items() if tensor is not None}
        name = prefix.removesuffix(".") or "weight"
        if self.experts is not None:
            shapes = self._canonical_shapes()
            for key, shape in zip(("codes", "scale"), shapes, strict=True):
                if tuple(found[key].shape) != shape:
                    return f"{name}.{key}: expected shape {shape}, got {tuple(found[key].shape)}"
        for e in range(self.experts or 1):
            try:
                one = [found[key] if self.experts is None else found[key][e] for key in ("codes", "scale")]
                self.validate(one[0], one[1], found.get("codebook"), self.out_features, name)
            except (TypeError, ValueError) as error:
                return str(error) if self.experts is None else f"{error} of expert {e}"
        try:
            if "activation_scale" in found:
                check_activation_tensors(found["activation_scale"], found.get("activation_codebook"), name)
        except (TypeError, ValueError) as error:
            return str(error)
        return None

    def validate(
        self, codes: Tensor, scale: Tensor, codebook: Tensor | None, out_features: int, name: str
    ) -> None:
        """Check stored tensors of some rows of this weight, or of one expert's; see `ovp4_validate`.

        Raises:
            TypeError: a tensor of another dtype.
            ValueError: a wrong shape, an invalid pair, a bad scale, or no codebook.
        """
        size = {"out_features": out_features, "in_features": self.in_features}
        if codebook is None:
            ovp8_validate(codes, scale, **size, group_size=self.group_size, name=name)
        else:
            ovp4_validate(codes, scale, codebook, **size, group_size=self.group_size, name=name)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # copy_() would convert dtypes silently, and kernels trust codes and scales: check before taking them.
        if (problem := self._invalid(state_dict, prefix)) is not None:
            error_msgs.append(problem)
            return
        packed = self.is_packed
        self.unpack_()
        lists = (missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        self.refresh_activations_()
        if packed or ops.has_packed_layout(self.codes.device):
            self.pack_()

    def _apply(self, fn: Any, recurse: bool = True) -> OVPWeight:
        # A move to another device, to shared memory or to another dtype sees the canonical layout only.
        packed, device = self.is_packed, self.codes.device
        self.unpack_()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        if packed or self.codes.device != device:
            self.pack_()
        return self

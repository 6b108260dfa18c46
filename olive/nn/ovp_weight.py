"""`OVPWeight`: one weight [N, K], or a stack [E, N, K], in 4-bit outlier-victim pairs, as a module.

A state dict always holds the canonical layout (`codes`, `scale`, `codebook` of `olive.formats`). Where a
device's kernels have a packed layout the same parameters hold that instead: the weight is in memory once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from olive import ops
from olive.formats import codes_shape, ovp4_validate, scale_shape
from olive.nn.origin import empty, frozen


class OVPWeight(nn.Module):
    """Parameters of one quantized weight, or of a stack of weights of one shape (experts).

    Args:
        out_features: N.
        in_features: K.
        group_size: -1 per channel, 0 per tensor, else columns per group.
        experts: None for one weight; E for a stack, which adds a leading dimension to codes and scale.
        transposed: whether the float parameter it stands for is laid out [..., K, N], as in transformers'
            `Conv1D`; codes are [N, K] in either case.
        device: where the empty parameters are made.
        dtype: of the float parameter; `.to(dtype)` changes it, codes and scale stay as they are.

    Attributes:
        codes: uint8 [N, ceil(K / 2)], or packed (`olive.ops.packed`); with [E] before it in a stack.
        scale: int16 [N, G], or packed; likewise.
        codebook: int8 [32].
        sqnr_db: signal-to-quantization-noise ratio of the weight in dB; None if not known.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        group_size: int,
        *,
        experts: int | None = None,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.group_size = out_features, in_features, group_size
        self.experts, self.transposed = experts, transposed
        self.dtype = dtype or torch.get_default_dtype()
        self.sqnr_db: float | None = None
        codes, scale = self._canonical_shapes()
        self.codes = empty(codes, torch.uint8, device)
        self.scale = empty(scale, torch.int16, device)
        self.codebook = empty((32,), torch.int8, device)

    def _canonical_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        stack = () if self.experts is None else (self.experts,)
        codes = codes_shape(self.out_features, self.in_features)
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

    def set_(self, codes: Tensor, scale: Tensor, codebook: Tensor) -> None:
        """Take tensors in the canonical layout as the weight; nothing is copied.

        Raises:
            TypeError: a tensor of another dtype.
            ValueError: a tensor of another shape.
        """
        shapes = self._canonical_shapes()
        expected = (
            ("codes", codes, torch.uint8, shapes[0]),
            ("scale", scale, torch.int16, shapes[1]),
            ("codebook", codebook, torch.int8, (32,)),
        )
        for name, tensor, dtype, shape in expected:
            if tensor.dtype != dtype:
                raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        self.codes, self.scale, self.codebook = frozen(codes), frozen(scale), frozen(codebook)

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

    def canonical(self) -> tuple[Tensor, Tensor, Tensor]:
        """The stored form, whatever the layout in memory: codes, scale, codebook."""
        if not self.is_packed:
            return self.codes.detach(), self.scale.detach(), self.codebook.detach()
        codes, scale = self._relayout(self._unpack_one)
        return codes, scale, self.codebook.detach()

    def pack_(self) -> None:
        """Bring codes and scale into the layout of their device's backend; nothing where there is none."""
        if not self.is_packed and ops.has_packed_layout(self.codes.device):
            codes, scale = self._relayout(self._pack_one)
            self.codes, self.scale = frozen(codes), frozen(scale)

    def unpack_(self) -> None:
        """Bring codes and scale back into the canonical layout."""
        if self.is_packed:
            codes, scale = self._relayout(self._unpack_one)
            self.codes, self.scale = frozen(codes), frozen(scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode to `dtype`: [N, K], or [E, N, K]."""
        codes, scale, codebook = self.canonical()
        size = (self.in_features, self.group_size, dtype)
        if self.experts is None:
            decoded: Tensor = ops.ovp_decode(codes, scale, codebook, *size)
            return decoded
        return torch.stack([ops.ovp_decode(codes[e], scale[e], codebook, *size) for e in range(self.experts)])

    def to_float(self) -> Tensor:
        """The decoded weight as the float parameter was: its layout and the model's dtype."""
        decoded = self.dequantize(self.dtype)
        return decoded.transpose(-1, -2).contiguous() if self.transposed else decoded

    def linear(self, input: Tensor, bias: Tensor | None = None, expert: int | None = None) -> Tensor:
        """input [..., K] times the transposed weight (of one expert) plus bias: [..., N], input's dtype."""
        codes: Tensor = self.codes
        scale: Tensor = self.scale
        if expert is not None:
            codes, scale = codes[expert], scale[expert]
        out: Tensor = ops.ovp_linear(
            input, codes, scale, self.codebook, bias, self.out_features, self.group_size
        )
        return out

    def extra_repr(self) -> str:
        stack = "" if self.experts is None else f"experts={self.experts}, "
        return (
            f"{stack}in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.group_size}"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_packed:
            destination[prefix + "codes"], destination[prefix + "scale"], _ = self.canonical()

    def _invalid(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """What is wrong with the stored tensors of this module, or None. Tensors without values pass."""
        stored = [state_dict.get(prefix + key) for key in ("codes", "scale", "codebook")]
        if not all(isinstance(tensor, Tensor) and not tensor.is_meta for tensor in stored):
            return None
        codes, scale, codebook = (tensor.detach() for tensor in stored if tensor is not None)
        name = prefix.removesuffix(".") or "weight"
        if self.experts is not None:
            shapes = self._canonical_shapes()
            for key, tensor, shape in (("codes", codes, shapes[0]), ("scale", scale, shapes[1])):
                if tuple(tensor.shape) != shape:
                    return f"{name}.{key}: expected shape {shape}, got {tuple(tensor.shape)}"
        for e in range(self.experts or 1):
            one = (codes, scale) if self.experts is None else (codes[e], scale[e])
            try:
                ovp4_validate(
                    *one,
                    codebook,
                    out_features=self.out_features,
                    in_features=self.in_features,
                    group_size=self.group_size,
                    name=name,
                )
            except (TypeError, ValueError) as error:
                return str(error) if self.experts is None else f"{error} of expert {e}"
        return None

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

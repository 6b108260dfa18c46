"""`UniformLinear`: `nn.Linear` with a weight of integer codes, and its input as it is or quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from olive import ops
from olive.formats.layout import PER_CHANNEL
from olive.formats.uniform import (
    check_bits,
    pack_codes,
    uniform_codes_shape,
    uniform_scale_shape,
    uniform_validate,
)
from olive.nn.keep_float32 import keeping_float32
from olive.nn.lazy_weight import LazyWeight
from olive.ops.lsq import integer_range

_FLOAT32_BUFFERS = ("scale", "input_scale", "input_offset")


class UniformLinear(nn.Module):
    """y = x W^T + bias with W on a uniform grid; the output has the input's dtype.

    State-dict keys: `codes`, `scale`, `bias`; with quantized inputs `input_scale`, and `input_offset` where
    there is one. Scales and offsets stay float32, whatever dtype the module is brought to.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias.
        bits: of a code, 1 to 8.
        mid_rise: which grid (`olive.formats.uniform`): StatsQ's, else LSQ's.
        group_size: -1 per channel, else columns per group.
        input_bits: of the quantized input, 1 to 8; None = it is not quantized.
        input_signed: whether its levels go below zero.
        input_tokens: 1 = one scale for the input; T = one for each of its T token positions.
        input_offset: whether something is added to the input before it is quantized.
        device: of the empty tensors.
        dtype: of the bias, and of `weight`.

    Attributes:
        codes: uint8 [N, ceil(K w / 8)].
        scale: float32 [N, G].
        input_scale: float32 [1] or [T]; None = the input is not quantized.
        input_offset: float32 [K], or None.

    Raises:
        ValueError: a number out of its range.
    """

    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None
    input_offset: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        mid_rise: bool = True,
        group_size: int = PER_CHANNEL,
        input_bits: int | None = None,
        input_signed: bool = True,
        input_tokens: int = 1,
        input_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"in_features, out_features: expected at least 1, got {in_features}, {out_features}"
            )
        if input_bits is not None:
            check_bits(input_bits, "input_bits")
        elif input_offset or input_tokens != 1:
            raise ValueError("input_bits: expected a number with an input_offset or input_tokens, got None")
        if input_tokens < 1:
            raise ValueError(f"input_tokens: expected at least 1, got {input_tokens}")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.mid_rise, self.group_size = check_bits(bits), mid_rise, group_size
        self.input_bits, self.input_signed = input_bits, input_signed
        self.dtype = dtype or torch.get_default_dtype()

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.register_buffer(
            "codes", empty(*uniform_codes_shape(out_features, in_features, bits), dtype=torch.uint8)
        )
        self.register_buffer("scale", empty(*uniform_scale_shape(out_features, in_features, group_size)))
        self.register_buffer("input_scale", None if input_bits is None else empty(input_tokens))
        self.register_buffer("input_offset", empty(in_features) if input_offset else None)
        new = nn.Parameter(empty(out_features, dtype=self.dtype)) if bias else None
        self.register_parameter("bias", new)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        bias: nn.Parameter | None = None,
        *,
        bits: int,
        mid_rise: bool,
        group_size: int = PER_CHANNEL,
        input_scale: Tensor | None = None,
        input_offset: Tensor | None = None,
        input_bits: int | None = None,
        input_signed: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer of signed codes, as `olive.ops.statsq_codes` returns them, on their device.

        Args:
            codes: int8 [N, K], k in -2^(bits - 1) .. 2^(bits - 1) - 1: values are scale (k + 1/2) with
                mid_rise, else scale k.
            scale: float32 [N, G], finite step sizes of at least 0: StatsQ's s / 2^(bits - 1).
            bias: of the layer it stands for: taken as it is.
            input_scale: float32 [1] or [T], with input_bits; finite.
            input_offset: float32 [K], finite, or None.
            bits, mid_rise, group_size, input_bits, input_signed, dtype: as for the class.

        Raises:
            TypeError: a tensor of another dtype.
            ValueError: a tensor of another shape, a value or a number out of its range.
        """
        if codes.dtype != torch.int8:
            raise TypeError(f"codes: expected torch.int8, got {codes.dtype}")
        if codes.dim() != 2:
            raise ValueError(f"codes: expected shape [N, K], got {tuple(codes.shape)}")
        if (input_scale is None) != (input_bits is None):
            raise ValueError("input_scale, input_bits: expected both or neither")
        if input_scale is not None and input_scale.dim() != 1:
            raise ValueError(f"input_scale: expected shape [1] or [T], got {tuple(input_scale.shape)}")
        half = 2 ** (check_bits(bits) - 1)
        rows, columns = (int(size) for size in codes.shape)
        if codes.numel() and not -half <= int(codes.min()) <= int(codes.max()) < half:
            raise ValueError(
                f"codes: expected {-half} to {half - 1} for {bits} bits, "
                f"got {int(codes.min())} to {int(codes.max())}"
            )
        new = cls(
            columns,
            rows,
            bias=False,
            bits=bits,
            mid_rise=mid_rise,
            group_size=group_size,
            input_bits=input_bits,
            input_signed=input_signed,
            input_tokens=1 if input_scale is None else int(input_scale.shape[0]),
            input_offset=input_offset is not None,
            device="meta",
            dtype=dtype or (None if bias is None else bias.dtype),
        )
        found = {"codes": pack_codes((codes.short() + half).to(torch.uint8), bits), "scale": scale}
        found |= {} if input_scale is None else {"input_scale": input_scale}
        found |= {} if input_offset is None else {"input_offset": input_offset}
        new.validate(found, "weight")
        for name, tensor in found.items():
            new._buffers[name] = tensor.detach().to(codes.device)
        new.register_parameter("bias", bias)
        return new

    def validate(self, tensors: dict[str, Tensor], name: str) -> None:
        """Check tensors that are to be this layer's buffers.

        Args:
            tensors: the buffers that this layer has, by name.
            name: prefix of the tensors' names in errors.

        Raises:
            TypeError: a tensor of another dtype.
            ValueError: a wrong shape, or a value out of its range.
        """
        uniform_validate(
            tensors["codes"],
            tensors["scale"],
            out_features=self.out_features,
            in_features=self.in_features,
            bits=self.bits,
            group_size=self.group_size,
            name=name,
        )
        for field in _FLOAT32_BUFFERS[1:]:
            held, tensor = self._buffers.get(field), tensors.get(field)
            if held is None or tensor is None:
                continue
            if tensor.dtype != torch.float32:
                raise TypeError(f"{name}.{field}: expected torch.float32, got {tensor.dtype}")
            if tensor.shape != held.shape:
                raise ValueError(
                    f"{name}.{field}: expected shape {tuple(held.shape)}, got {tuple(tensor.shape)}"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name}.{field}: expected finite values, got NaN or Inf")

    @property
    def input_range(self) -> tuple[int, int] | None:
        """(qmin, qmax) of the quantized input; None = it is not quantized."""
        return None if self.input_bits is None else integer_range(self.input_bits, self.input_signed)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded weight [N, K]."""
        size = (self.in_features, self.bits, self.mid_rise, self.group_size)
        decoded: Tensor = ops.uniform_decode(self.codes, self.scale, *size, dtype)
        return decoded

    def to_float(self) -> Tensor:
        """The decoded weight in the model's dtype."""
        return self.dequantize(self.dtype)

    def to_linear(self) -> nn.Linear:
        """The float layer with the decoded weight; it has the same bias, and no quantizer of its input."""
        new = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        new.weight = nn.Parameter(self.to_float(), requires_grad=False)
        new.register_parameter("bias", self.bias)
        return new.train(self.training)

    @property
    def weight(self) -> Tensor:
        """The decoded weight; decoded anew each time its values are used."""
        if torch.compiler.is_compiling():
            return self.to_float()  # the compiler drops it where only its dtype is looked at
        return LazyWeight((self.out_features, self.in_features), self.dtype, self.codes.device, self.to_float)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply.

        Args:
            input: float32, bfloat16 or float16 [..., K]; [..., T, K] where there are T input scales.

        Returns:
            input's dtype, [..., N].
        """
        out: Tensor = ops.uniform_linear(
            input,
            self.codes,
            self.scale,
            self.bias,
            self.bits,
            self.mid_rise,
            self.group_size,
            self.input_scale,
            self.input_offset,
            8 if self.input_bits is None else self.input_bits,
            self.input_signed,
        )
        return out

    def extra_repr(self) -> str:
        kind = "mid-rise" if self.mid_rise else "mid-tread"
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits} ({kind}), "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )
        if self.input_scale is None:
            return text
        sign = "signed" if self.input_signed else "unsigned"
        tokens = "" if self.input_scale.shape[0] == 1 else f", input_tokens={self.input_scale.shape[0]}"
        offset = "" if self.input_offset is None else ", input_offset=True"
        return f"{text}, input_bits={self.input_bits} ({sign}){tokens}{offset}"

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
        held = [name for name, buffer in self._buffers.items() if buffer is not None]
        found = {name: state_dict[prefix + name] for name in held if prefix + name in state_dict}
        if len(found) == len(held) and not any(tensor.is_meta for tensor in found.values()):
            try:
                self.validate(found, prefix.removesuffix(".") or "weight")
            except (TypeError, ValueError) as error:
                error_msgs.append(str(error))
                return
        lists = (missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        device, scales = self.codes.device, [self._buffers[name] for name in _FLOAT32_BUFFERS]
        super()._apply(keeping_float32(fn, scales), recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        return self

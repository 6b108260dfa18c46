"""Checks of a quantized checkpoint: its files' headers before loading, the tensors' contents after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from olive.formats import PER_TENSOR, codes_shape, scale_shape
from olive.nn import OVPWeight
from olive.nn.ovp_weight import check_activation_tensors

_VALUES_AT_A_TIME = 1 << 22
SAVE_ID = "olive_save_id"  # key in the metadata of every file
_DTYPES = {  # as safetensors calls them
    "codes": "U8",
    "scale": "I16",
    "codebook": "I8",
    "activation_scale": "I16",
    "activation_codebook": "I8",
}
_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I16": "int16",
    "I8": "int8",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}
FLOATS = ("F32", "F16", "BF16")
AGAIN = "save the model again, or fetch the file again if it was copied"


class Header(NamedTuple):
    """Where a tensor lies and what it is."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_headers(files: Sequence[str], save_id: str | None) -> dict[str, Header]:
    """Names, types and shapes of all tensors in safetensors files; no tensor is read.

    Args:
        files: the checkpoint's files.
        save_id: what `config.json` says; None = any.

    Raises:
        ValueError: a damaged file, or one that another save wrote.
    """
    found: dict[str, Header] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                for key in opened.keys():  # noqa: SIM118 (not a dictionary)
                    part = opened.get_slice(key)
                    found[key] = Header(file, part.get_dtype(), tuple(part.get_shape()))
        except SafetensorError as error:
            raise ValueError(f"{file}: expected a complete safetensors file, got {error}; {AGAIN}") from error
        if save_id is not None and metadata.get(SAVE_ID) != save_id:
            raise ValueError(
                f"{file}: expected a file of save {save_id}, which config.json names, "
                f"got one of save {metadata.get(SAVE_ID)}; the folder mixes files of two saves, as an "
                f"interrupted save leaves them: save the model again into an empty folder"
            )
    return found


def check_headers(name: str, weight: OVPWeight, headers: dict[str, Header]) -> None:
    """Check that the files hold every stored tensor of one weight, in the right types and shapes.

    Args:
        name: of the module in the checkpoint.
        weight: the empty module they are to be loaded into.
        headers: of all files.

    Raises:
        ValueError: a tensor is missing or has another shape.
        TypeError: a tensor of another type.
    """
    codes, scale = stored_shapes(weight)
    shapes = {"codes": codes, "scale": scale, "codebook": (32,)}
    shapes |= {"activation_scale": (1,), "activation_codebook": (32,)}
    for field, shape in shapes.items():
        if weight._parameters.get(field) is not None:
            check_header(f"{name}.{field}", (_DTYPES[field],), shape, headers)


def check_float_header(name: str, parameter: Tensor, headers: dict[str, Header]) -> None:
    """The same for a float parameter of a quantized module, e.g. its bias; any float type will do."""
    check_header(name, FLOATS, tuple(parameter.shape), headers)


def check_header(
    name: str, dtypes: tuple[str, ...], shape: tuple[int, ...], headers: Mapping[str, Header]
) -> None:
    """Check that the files hold one tensor.

    Args:
        name: of the tensor.
        dtypes: that it may have, as safetensors calls them.
        shape: that it has.
        headers: of all files.

    Raises:
        ValueError: it is missing or has another shape.
        TypeError: it has another type.
    """
    header = headers.get(name)
    if header is None:
        raise ValueError(f"{name}: expected in the checkpoint, got no such tensor; {AGAIN}")
    if header.dtype not in dtypes:
        raise TypeError(
            f"{name}: expected {' or '.join(_NAMES[dtype] for dtype in dtypes)}, "
            f"got {_NAMES.get(header.dtype, header.dtype)} in {header.file}; {AGAIN}"
        )
    if header.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {header.shape} in {header.file}; {AGAIN}")


def stored_shapes(weight: OVPWeight) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of codes and scale in the stored layout, with the leading dimension of a stack."""
    stack = () if weight.experts is None else (weight.experts,)
    codes = codes_shape(weight.out_features, weight.in_features, weight.bits)
    scale = scale_shape(weight.out_features, weight.in_features, weight.group_size)
    return (*stack, *codes), (*stack, *scale)


def check_contents(name: str, weight: OVPWeight) -> None:
    """Check the loaded tensors of one weight, all of it.

    Args:
        name: of the module, for errors.
        weight: holds the stored layout; kernels trust its values afterwards.

    Raises:
        ValueError: a wrong shape, invalid pair, scale or codebook.
        TypeError: a tensor of another type.
    """
    codes, scale = weight.codes.detach(), weight.scale.detach()
    codebook = None if weight.codebook is None else weight.codebook.detach()
    for field, tensor, shape in zip(("codes", "scale"), (codes, scale), stored_shapes(weight), strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}.{field}: expected shape {shape}, got {tuple(tensor.shape)}; {AGAIN}")
    parts: Iterable[tuple[str, Tensor, Tensor]] = [("", codes, scale)]
    if weight.experts is not None:
        parts = ((f" of expert {e}", codes[e], scale[e]) for e in range(weight.experts))
    for which, one_codes, one_scale in parts:
        try:
            _validate(one_codes, one_scale, codebook, weight, name)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}{which}; {AGAIN}") from None
    if weight.activation_scale is not None:
        try:
            check_activation_tensors(weight.activation_scale, weight.activation_codebook, name)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}; {AGAIN}") from None


def _validate(codes: Tensor, scale: Tensor, codebook: Tensor | None, weight: OVPWeight, name: str) -> None:
    """`OVPWeight.validate` on some rows at a time: its masks are several times as large as the codes."""
    columns, group_size = weight.in_features, weight.group_size
    step = max(1, _VALUES_AT_A_TIME // columns)

    def validate(start: int, rows: int) -> None:
        part_scale = scale if group_size == PER_TENSOR else scale[start : start + rows]
        count = min(rows, weight.out_features - start)
        weight.validate(codes[start : start + rows], part_scale, codebook, count, name)

    for start in range(0, weight.out_features, step):
        try:
            validate(start, step)
        except (TypeError, ValueError):
            validate(0, weight.out_features)  # its error names the row in the whole weight
            raise

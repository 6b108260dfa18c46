"""What only a GPU can show: operators against the CPU's, hot paths without waiting, graphs, whole models."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import olive
from olive import QuantConfig, ops
from olive.formats import GROUP_SIZES, pack_scale
from olive.ops.gpu import gpu_backend
from olive.ptq import quantize_weight
from tests.ops.cpu_cases import BOOKS, DTYPES, heavy_tailed, random_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = ((1, 1), (5, 7), (33, 200), (130, 1100), (64, 4096))


def _on_gpu(*tensors: Tensor) -> list[Tensor]:
    return [tensor.cuda() for tensor in tensors]


def _activations(format: str, group_size: int) -> tuple[Any, ...]:
    """The operators' arguments after the weight's."""
    table = BOOKS["int4"].tensor() if format == "ovp4" else None
    static = pack_scale(torch.tensor([0.02]), torch.tensor([False])) if group_size == 0 else None
    return format, group_size, "optimal", table, static


def _moved(arguments: tuple[Any, ...]) -> list[Any]:
    return [value.cuda() if isinstance(value, Tensor) else value for value in arguments]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codebook", ["adaptive", "int4", "flint4", "learned"])
def test_quantizing_gives_the_cpus_bits(codebook: str, dtype: torch.dtype, group_size: int) -> None:
    config = QuantConfig(codebook=codebook, group_size=group_size)
    for shape in SHAPES[1:]:
        weight = heavy_tailed(*shape).to(dtype)
        on_cpu, on_gpu = quantize_weight(weight, config), quantize_weight(weight.cuda(), config)
        for expected, got in zip(on_cpu, on_gpu, strict=True):
            assert torch.equal(expected, got.cpu())


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("book", BOOKS)
def test_encode_decode_and_pack_give_the_cpus_bits(book: str, group_size: int) -> None:
    for shape in SHAPES:
        codes, scale, table = random_weight(*shape, group_size, book)
        on_gpu = _on_gpu(codes, scale, table)
        for dtype in DTYPES:
            expected = ops.ovp_decode(codes, scale, table, shape[1], group_size, dtype)
            got = ops.ovp_decode(*on_gpu, shape[1], group_size, dtype)
            assert torch.equal(expected, got.cpu())
            weight = heavy_tailed(*shape).to(dtype)
            for pairing in ("optimal", "paper"):
                expected = ops.ovp_encode(weight, scale, table, group_size, pairing)
                got = ops.ovp_encode(weight.cuda(), *on_gpu[1:], group_size, pairing)
                assert torch.equal(expected, got.cpu())
        packed = ops.ovp_pack(*on_gpu[:2], shape[1], group_size)
        for expected, got in zip((codes, scale), ops.ovp_unpack(*packed, *shape, group_size), strict=True):
            assert torch.equal(expected, got.cpu())


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("format", ["int8", "ovp4", "ovp8"])
def test_quantizing_activations_gives_the_cpus_bits(format: str, group_size: int) -> None:
    arguments = _activations(format, group_size)
    for shape in SHAPES:
        for dtype in DTYPES:
            x = (50 * heavy_tailed(*shape)).to(dtype)
            level_type = torch.bfloat16 if format == "ovp8" else torch.int8
            expected = ops.quantize_activations(x, *arguments, level_type)
            got = ops.quantize_activations(x.cuda(), *_moved(arguments), level_type)
            for wanted, found in zip(expected, got, strict=True):
                assert torch.equal(wanted, found.cpu())


@pytest.mark.parametrize("rows", [1, 16, 64, 300])
@pytest.mark.parametrize("format", ["int8", "ovp4"])
@pytest.mark.parametrize(("group_size", "activation_group_size"), [(-1, -1), (0, 0), (128, -1), (32, 64)])
def test_integer_products_are_the_cpus(
    group_size: int, activation_group_size: int, format: str, rows: int
) -> None:
    """With scales in between, sums may be added in another order."""
    arguments = _activations(format, activation_group_size)
    codes, scale, table = random_weight(130, 1100, group_size, "adaptive")
    x = (50 * heavy_tailed(rows, 1100)).bfloat16()
    expected = ops.ovp_linear_quantized(x, codes, scale, table, None, 130, group_size, *arguments)
    on_gpu = _on_gpu(x, codes, scale, table)
    got = ops.ovp_linear_quantized(*on_gpu, None, 130, group_size, *_moved(arguments)).cpu()
    if group_size <= 0 and activation_group_size <= 0:
        assert torch.equal(got, expected)
    limit = 2.0**-8 * expected.abs() + 2.0**-20 * expected.abs().amax(1, keepdim=True)
    assert bool(((got.double() - expected.double()).abs() <= limit).all())


def test_values_that_are_not_finite_are_refused() -> None:
    weight = torch.randn(64, 256, device="cuda")
    weight[63, 255] = torch.inf
    table, scale = BOOKS["nf4"].tensor().cuda(), torch.full((64, 2), 0x3C00, dtype=torch.int16, device="cuda")
    with pytest.raises(ValueError, match="weight: expected finite values, got NaN or Inf"):
        ops.ovp_encode(weight, scale, table, 128, "optimal")
    with pytest.raises(ValueError, match="weight: expected finite values, got NaN or Inf"):
        ops.ovp_quantize(weight, table, 128, "optimal", [1.0], [], None)


def test_tensors_on_two_devices_are_refused() -> None:
    codes, scale, table = random_weight(64, 128, 64, "nf4")
    with pytest.raises(ValueError, match="expected every tensor on one device"):
        ops.ovp_linear(torch.randn(1, 128, device="cuda"), codes, scale, table, None, 64, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    codes, scale, table = _on_gpu(*random_weight(64, 128, 64, "adaptive"))
    packed = ops.ovp_pack(codes, scale, 128, 64)
    x = torch.randn(3, 128, dtype=dtype, device="cuda", requires_grad=True)
    torch.library.opcheck(torch.ops.olive.ovp_linear.default, (x, *packed, table, None, 64, 64))
    torch.library.opcheck(torch.ops.olive.ovp_decode.default, (codes, scale, table, 128, 64, dtype))
    arguments, plain = _moved(_activations("ovp4", -1)), x.detach()
    torch.library.opcheck(torch.ops.olive.quantize_activations.default, (plain, *arguments, torch.int8))
    linear = torch.ops.olive.ovp_linear_quantized.default
    torch.library.opcheck(linear, (plain, *packed, table, None, 64, 64, *arguments))


@contextmanager
def _allocations_without_waiting() -> Iterator[Callable[[], int]]:
    """Whatever waits for the device is an error inside; yields what counts the allocations since."""

    def count() -> int:
        return int(torch.cuda.memory_stats()["allocation.all.allocated"])

    with warnings.catch_warnings():  # that the mode is a prototype, once
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    before = count()
    try:
        yield lambda: count() - before
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rows", [1, 16, 64, 300])
def test_the_hot_path_neither_waits_nor_allocates_beyond_its_output(rows: int) -> None:
    if gpu_backend(torch.device("cuda", torch.cuda.current_device())) != "cuda":
        pytest.skip("the CUDA kernels were not built")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("blocks form no clusters before Hopper: a split needs a buffer")
    codes, scale, table = _on_gpu(*random_weight(4096, 4096, 128, "adaptive"))
    packed = ops.ovp_pack(codes, scale, 4096, 128)
    x = torch.randn(rows, 4096, dtype=torch.bfloat16, device="cuda")
    ops.ovp_linear(x, *packed, table, None, 4096, 128)
    with _allocations_without_waiting() as allocations:
        out = ops.ovp_linear(x, *packed, table, None, 4096, 128)
    assert allocations() == 1
    assert out.shape == (rows, 4096)


@pytest.mark.parametrize("format", ["int8", "ovp4"])
@pytest.mark.parametrize("rows", [1, 64, 300])
def test_quantized_activations_neither_wait_nor_allocate_beyond_their_levels(rows: int, format: str) -> None:
    if gpu_backend(torch.device("cuda", torch.cuda.current_device())) != "cuda":
        pytest.skip("the CUDA kernels were not built")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("blocks form no clusters before Hopper: a split needs a buffer")
    codes, scale, table = _on_gpu(*random_weight(4096, 4096, 128, "adaptive"))
    arguments = (
        *ops.ovp_pack(codes, scale, 4096, 128),
        table,
        None,
        4096,
        128,
        *_moved(_activations(format, -1)),
    )
    x = torch.randn(rows, 4096, dtype=torch.bfloat16, device="cuda")
    expected = ops.ovp_linear_quantized(x, *arguments)
    with _allocations_without_waiting() as allocations:
        ops.ovp_linear_quantized(x, *arguments)
    assert allocations() == 3
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ops.ovp_linear_quantized(x, *arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.ovp_linear_quantized(x, *arguments)
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("rows", [1, 16, 64, 300])
def test_a_captured_graph_gives_the_same_bits(rows: int) -> None:
    codes, scale, table = _on_gpu(*random_weight(1000, 1500, 128, "adaptive"))
    weight = ops.ovp_pack(codes, scale, 1500, 128) if ops.has_packed_layout(codes.device) else (codes, scale)
    x = torch.randn(rows, 1500, dtype=torch.float16, device="cuda")
    expected = ops.ovp_linear(x, *weight, table, None, 1000, 128)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ops.ovp_linear(x, *weight, table, None, 1000, 128)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.ovp_linear(x, *weight, table, None, 1000, 128)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, ops.ovp_linear(x, *weight, table, None, 1000, 128))
    assert not torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_captured_rotation_gives_the_same_bits(dtype: torch.dtype) -> None:
    x = torch.randn(3, 1536, dtype=dtype, device="cuda")
    exact = ops.block_hadamard(x.double(), 256)
    error = (ops.block_hadamard(x, 256).double() - exact).abs()  # the matrix is on the GPU from here on
    assert bool((error <= torch.finfo(dtype).eps * exact.abs() + 1e-4).all())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.block_hadamard(x, 256)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, ops.block_hadamard(x, 256))


def _small_llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, max_position_embeddings=256,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_quantized_model_computes_what_its_decoded_weights_do(dtype: torch.dtype) -> None:
    model = olive.quantize(_small_llama().to(dtype).cuda())
    tokens = torch.randint(0, 128, (3, 40), device="cuda")
    with torch.no_grad():
        got = model(tokens, use_cache=False).logits.double()
        decoded = olive.dequantize(copy.deepcopy(model))
        expected = decoded(tokens, use_cache=False).logits.double()
        exact = decoded.double()(tokens, use_cache=False).logits
    # Rounding differs at every layer; both are as far from float64.
    assert bool((got - exact).norm() <= 1.5 * (expected - exact).norm())


def test_a_model_moves_to_the_gpu_and_back() -> None:
    torch.manual_seed(6)
    model = olive.quantize(torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.Linear(128, 64)))
    x = torch.randn(7, 256)
    expected, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    model.cuda()
    moved = model(x.cuda()).cpu()
    assert bool(((moved - expected).abs() <= 1e-4 * expected.abs().max()).all())
    for key, value in model.state_dict().items():
        assert torch.equal(value.cpu(), state[key])
    assert torch.equal(model.cpu()(x), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_generation_with_a_static_cache_under_reduce_overhead() -> None:
    model = olive.quantize(_small_llama().to(torch.bfloat16).cuda())
    prompt = torch.randint(0, 128, (1, 12), device="cuda")
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **options)
    model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    got = model.generate(prompt, cache_implementation="static", **options)
    # Inductor rounds between layers less often: a token may differ where two are as likely.
    agree = (got == expected).float().mean()
    assert bool(agree >= 0.5)
    assert torch.equal(got[:, :14], expected[:, :14])

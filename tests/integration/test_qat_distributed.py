"""Two processes (gloo, DDP and FSDP2) train as one does: trackers, annealing and merged weights included.

What is compared bit for bit: one process that takes the two halves of a batch one after the other adds the
same numbers. On the whole batch at once sums run in another order, and one last bit may turn a weight or an
activation to its next level; so there only the first step is compared.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from olive.qat.preparation import quantizers
from tests.integration.distributed import CONFIGS, Result, data, model_of, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]
ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240  # seconds for all cases; they take 50 on two busy cores


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of all cases, of both processes: each of them takes seconds to start."""
    file, port = tmp_path_factory.mktemp("distributed") / "result", str(free_port())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.distributed", str(rank), port, str(file)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), outputs
    first, second = (torch.load(f"{file}.{rank}", weights_only=False) for rank in range(2))
    return first, second


@pytest.fixture(scope="module")
def alone() -> dict[str, Result]:
    """One process that takes both halves."""
    found = {}
    for kind, config in CONFIGS.items():
        model = model_of(config)
        found[kind] = run(model, model)
    return found


def of(results: tuple[dict[str, Any], dict[str, Any]], case: str) -> tuple[Result, Result]:
    found = tuple(one.get(case, "a case before it failed") for one in results)
    assert not any(isinstance(one, str) for one in found), found
    return found  # type: ignore[return-value]


def test_first_forward_pass_sets_the_same_scales_in_all_processes(results: Any) -> None:
    first, second = (one["scales"] for one in of(results, "ddp first batch"))
    whole = {name: one.scale for name, one in quantizers(model_of(CONFIGS["statsq"])).items()}
    assert first.keys() == second.keys() == whole.keys()
    for name, scale in first.items():
        assert torch.equal(scale, second[name])
        # Means of two halves, in place of one over all.
        assert bool(((scale - whole[name]).abs() <= 1e-5 * whole[name]).all())


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_as_one(how: str, kind: str, results: Any, alone: dict[str, Result]) -> None:
    for found in of(results, f"{how} {kind}"):
        expected = alone[kind]
        assert found["state"].keys() == expected["state"].keys()
        different = [
            name for name, one in expected["state"].items() if not torch.equal(found["state"][name], one)
        ]
        assert different == []
        assert bool(((found["losses"] - expected["losses"]).abs() <= 1e-6).all())
        assert found["frozen_moved"] == 0 and found["free_moved"] > 0


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_trackers_count_every_weight_once(
    how: str, kind: str, results: Any, alone: dict[str, Result]
) -> None:
    for found in of(results, f"{how} {kind}"):
        assert found["layers"] == alone[kind]["layers"]
        assert found["shares"] == pytest.approx(alone[kind]["shares"])
        assert found["shares"]["oscillating"] > 0 and found["shares"]["at_boundary"] > 0
        assert torch.equal(found["histogram"], alone[kind]["histogram"])


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_first_step_is_that_on_the_whole_batch(kind: str, alone: dict[str, Result]) -> None:
    loss = model_of(CONFIGS[kind]).train()(**data(0)).loss
    assert alone[kind]["losses"][0].item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_gathered_weights_are_converted(kind: str, results: Any) -> None:
    for found in of(results, f"fsdp {kind}"):
        error = (found["converted"] - found["trained"]).square().mean()
        assert error <= 0.01 * found["trained"].square().mean()
        assert "expected a whole weight, got one that processes share; gather the state" in found["refused"]


def test_sharding_before_any_batch_is_refused(results: Any) -> None:
    for found in of(results, "fsdp without batch"):
        assert "expected scales of activations that are set before fully_shard" in found["error"]
        assert "prepare(model, config, batch=...)" in found["error"]


@pytest.mark.parametrize("who", ["tracker", "annealing"])
def test_channels_that_are_cut_up_are_refused(who: str, results: Any) -> None:
    """FSDP2 shards the first dimension; in transformers' Conv1D that is the input's."""
    for found in of(results, "fsdp conv1d"):
        assert "transformer.h.0.attn.c_attn.weight: expected output channels that are whole" in found[who]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(one, second[name]) for name, one in first.items()
    )


def test_a_callback_built_before_sharding_follows_as_one_built_after(results: Any) -> None:
    for found in of(results, "callback before sharding"):
        assert same(found["before"], found["after"])
        assert found["logged"]["qat/oscillating"] > 0


def test_all_processes_count_for_the_picture_that_one_draws(results: Any) -> None:
    first, second = of(results, "callback before sharding")
    (picture,) = first["drawn"]
    assert picture.histogram == first["histogram"] == second["histogram"] and second["drawn"] == []


def test_a_sharded_checkpoint_is_loaded_before_training(results: Any) -> None:
    for found in of(results, "checkpoint before training"):
        assert same(found["saved"], found["loaded"])
        assert found["shares"]["oscillating"] > 0


def test_a_process_without_rows_takes_part(results: Any) -> None:
    for found in of(results, "fsdp few rows"):
        assert torch.allclose(found["dampening"], found["expected"])
        assert found["histogram"].sum() > 0


def test_channels_along_the_second_dimension_are_followed(results: Any) -> None:
    for found in of(results, "fsdp conv1d by channels"):
        assert same(found["before"], found["after"])


def test_ddp_gives_all_processes_the_first_one_s_signs(results: Any) -> None:
    first, second = of(results, "ddp with other signs")
    assert torch.equal(first["logits"], second["logits"])
    assert first["signs"] == second["signs"]
    for found in (first, second):
        # DDP writes to buffers before each pass too; the device is not asked again.
        assert found["refreshed"] == [len(found["signs"]), 0, 0, 0, 0, 0]
        assert found["others"] == [not one for one in found["signs"]]

"""What each of two processes does in `test_qat_distributed.py`; results go through a file of rank 0.

Run as `python -m tests.integration.distributed CASE RANK PORT FILE`.
"""

from __future__ import annotations

import datetime
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock
from unittest.mock import ANY

import torch
import torch.distributed as dist
from torch import Tensor, nn

from olive.hf import OscillationCallback
from olive.qat import OscillationTracker, QATConfig, anneal, convert, dampening_loss, prepare
from olive.qat.activation_quantizer import ActivationQuantizer
from olive.qat.latent import latent_weights
from olive.qat.preparation import quantizers
from tests import models
from tests.qat.subjects import images, tiny_vit

WORLD = 2
RANGE = 0.05
STEPS, ANNEALED = 5, 4
COUNT = 8  # images in a step
CONFIGS = {
    "statsq": QATConfig(2, 4, activation_offsets=True),
    "lsq": QATConfig(3, 4, "lsq"),
    "qkr": QATConfig(2, 4, qkr=True, activation_granularity="per_token"),
}
Result = dict[str, Any]


def model_of(config: QATConfig, with_batch: bool = True) -> nn.Module:
    """A prepared model whose 32 and 48 rows two processes share evenly; its 5 classes not."""
    model = tiny_vit()
    return prepare(model, config, batch=data(0) if with_batch else None)


def data(step: int) -> dict[str, Tensor]:
    """The whole batch of a step."""
    return images(seed=step, count=COUNT)


def part(batch: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The images of one process."""
    size = COUNT // WORLD
    return {key: value[rank * size :][:size] for key, value in batch.items()}


def run(model: nn.Module, called: nn.Module, ranks: tuple[int, ...] = (0, 1)) -> Result:
    """Train with a tracker, then anneal; what became of the model.

    Args:
        model: prepared, sharded or not.
        called: the same, or what DDP made of it.
        ranks: whose parts of a batch this process takes, one after the other.
    """
    share = 1 / len(ranks)
    optimizer = torch.optim.SGD(called.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    tracker = OscillationTracker(model, momentum=0.2, boundary_range=RANGE, optimizer=optimizer)
    losses, frozen_moved, free_moved = [], 0, 0
    called.train()
    for step in range(STEPS + ANNEALED):
        if step == STEPS:
            anneal(model, optimizer, RANGE)
        optimizer.zero_grad()
        loss = torch.zeros(())
        for rank in ranks:
            one = share * called(**part(data(step), rank)).loss
            one.backward()
            loss += one.detach()
        before = {name: (one.inside(RANGE).clone(), one.latent().clone()) for name, one in held(model, step)}
        optimizer.step()
        for name, one in held(model, step):
            inside, old = before[name]
            changed = one.latent() != old
            frozen_moved += int((changed & ~inside).sum())
            free_moved += int((changed & inside).sum())
        losses.append(loss)
    total = torch.stack(losses)
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= WORLD
    return {
        "losses": total,
        "frozen_moved": frozen_moved,
        "free_moved": free_moved,
        "shares": tracker.shares(),
        "layers": {name: vars(one) for name, one in tracker.layers().items()},
        "histogram": tracker.histogram(8),
        "state": gathered(model),
    }


def held(model: nn.Module, step: int) -> list[tuple[str, Any]]:
    return list(latent_weights(model).items()) if step >= STEPS else []


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor as a whole."""
    state = {}
    for name, tensor in model.state_dict().items():
        full = getattr(tensor, "full_tensor", None)
        state[name] = (tensor if full is None else full()).detach().clone()
    return state


def same_on_all(state: dict[str, Tensor]) -> bool:
    """Whether each process has the same bits."""
    for tensor in state.values():
        first = tensor.clone()
        dist.broadcast(first, 0)
        different = torch.tensor([not torch.equal(first, tensor)]).int()
        dist.all_reduce(different)
        if different.item():
            return False
    return True


def ddp(kind: str, rank: int, with_batch: bool = True) -> Result:
    from torch.nn.parallel import DistributedDataParallel

    model = model_of(CONFIGS[kind], with_batch)
    called = DistributedDataParallel(model)
    first: dict[str, Tensor] = {}
    if not with_batch:
        called(**part(data(0), rank)).loss.backward()
        model.zero_grad()
        first = {name: one.scale.detach().clone() for name, one in quantizers(model).items()}
        assert same_on_all(first)
        assert same_on_all({name: one.signed.clone() for name, one in quantizers(model).items()})
        assert all(one.is_initialized for one in quantizers(model).values())
        return {"scales": first}
    result = run(model, called, (rank,))
    assert same_on_all(result["state"])
    return result


def shard(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.vit.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp(kind: str, rank: int) -> Result:
    model = shard(model_of(CONFIGS[kind]))
    try:
        convert(model)
        refused = ""
    except ValueError as error:
        refused = str(error)
    result = run(model, model, (rank,))
    whole = model_of(CONFIGS[kind])
    OscillationTracker(whole)
    whole.load_state_dict(result["state"])
    whole.eval()
    with torch.no_grad():
        trained = whole(**data(0)).logits
        converted = convert(whole)(**data(0)).logits
    result |= {"trained": trained, "converted": converted, "refused": refused}
    return result


def callback_before_sharding(rank: int) -> Result:
    """As under the Trainer: the callback exists before the model is sharded, and a log comes everywhere."""
    found: Result = {"drawn": []}
    for when in ("after", "before"):
        model = model_of(CONFIGS["statsq"])
        callback = None if when == "after" else callback_of(model)
        shard(model)
        callback = callback or callback_of(model)
        follow(model, callback, rank)
        found[when] = gathered(model)
    state = SimpleNamespace(is_world_process_zero=rank == 0, log_history=[{"step": STEPS}])
    with mock.patch(
        "olive.reports.oscillations.draw_oscillations", lambda one, *_, **__: found["drawn"].append(one)
    ):
        callback.on_log(ANY, state, ANY, logs={})
    return found | {"logged": state.log_history[-1], "histogram": callback.tracker.histogram().tolist()}


def callback_of(model: nn.Module) -> OscillationCallback:
    return OscillationCallback(model, momentum=0.2, boundary_range=RANGE, picture="unused.png")


def follow(model: nn.Module, callback: OscillationCallback, rank: int) -> None:
    """A few steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    callback.on_train_begin(ANY, ANY, ANY, optimizer=optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(**part(data(step), rank)).loss.backward()
        optimizer.step()


def checkpoint_before_training(rank: int) -> Result:
    """As the Trainer resumes: the model is sharded, then loaded in place, then training begins."""
    from torch.distributed import checkpoint

    folder = Path(sys.argv[3]).parent / "checkpoint"
    model = model_of(CONFIGS["lsq"])
    follow(model, callback_of(shard(model)), rank)
    checkpoint.save(model.state_dict(), checkpoint_id=folder)
    other = model_of(CONFIGS["lsq"])
    callback = callback_of(other)
    shard(other)
    checkpoint.load(other.state_dict(), checkpoint_id=folder)
    callback.on_train_begin(ANY, ANY, ANY, optimizer=torch.optim.SGD(other.parameters(), lr=0.1))
    return {"saved": gathered(model), "loaded": gathered(other), "shares": callback.tracker.shares()}


def ddp_with_other_signs(rank: int) -> Result:
    """Processes that were prepared on other data: DDP writes the first one's tensors to all."""
    from torch.nn.parallel import DistributedDataParallel

    model = model_of(CONFIGS["statsq"])
    if rank == 1:
        for one in quantizers(model).values():
            one.signed.logical_not_()
            one.scale.data *= 3
            one.refresh()
    called, counted = DistributedDataParallel(model), []
    with mock.patch.object(ActivationQuantizer, "refresh", autospec=True, side_effect=refresh) as refreshed:
        for _ in range(6):
            refreshed.reset_mock()
            logits = called(**data(0)).logits.detach()
            counted.append(refreshed.call_count)
        signs = [one.is_signed for one in quantizers(model).values()]
        for one in quantizers(model).values():
            one.signed.logical_not_()  # a checkpoint that is loaded in place
        called(**data(0))
    others = [one.is_signed for one in quantizers(model).values()]
    return {"logits": logits, "refreshed": counted, "signs": signs, "others": others}


refresh = ActivationQuantizer.refresh


def few_rows(rank: int) -> Result:
    """Of a weight of one row the second process has none."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(1, 8), nn.Linear(8, 8))
    prepare(model, QATConfig(2, 4), batch=torch.randn(4, 8))
    expected = dampening_loss(model).detach()
    fully_shard(model)
    loss = dampening_loss(model)
    loss.backward()
    total = loss.detach()
    dist.all_reduce(total)
    histogram = OscillationTracker(model).histogram(8)
    return {"expected": expected, "dampening": total, "histogram": histogram}


def fsdp_conv1d_by_channels(rank: int) -> Result:
    """Output channels of Conv1D lie along its second dimension."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    found = {}
    for when in ("after", "before"):
        torch.manual_seed(0)
        model = prepare(models.gpt2(), QATConfig(2))
        callback = None if when == "after" else callback_of(model)
        fully_shard(model, shard_placement_fn=lambda one: Shard(1) if one.dim() == 2 else None)
        tracker = (callback or callback_of(model)).tracker
        tracker.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        tracker.update()
        found[when] = gathered(model)
    return found


def fsdp_without_batch(rank: int) -> Result:
    model = shard(model_of(CONFIGS["statsq"], with_batch=False))
    try:
        model(**data(0))
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": ""}


def fsdp_conv1d(rank: int) -> Result:
    from torch.distributed.fsdp import fully_shard

    model = prepare(models.gpt2(), QATConfig(2))
    for layer in model.transformer.h:
        fully_shard(layer)
    fully_shard(model)
    errors = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attempts: dict[str, Callable[[], object]] = {
        "tracker": lambda: OscillationTracker(model),
        "annealing": lambda: anneal(model, optimizer),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            errors[name] = ""
        except ValueError as error:
            errors[name] = str(error)
    return errors


CASES: dict[str, Callable[[int], Result]] = {
    "ddp first batch": lambda rank: ddp("statsq", rank, with_batch=False),
    **{f"ddp {kind}": lambda rank, kind=kind: ddp(kind, rank) for kind in CONFIGS},
    **{f"fsdp {kind}": lambda rank, kind=kind: fsdp(kind, rank) for kind in CONFIGS},
    "fsdp without batch": fsdp_without_batch,
    "fsdp conv1d": fsdp_conv1d,
    "fsdp conv1d by channels": fsdp_conv1d_by_channels,
    "callback before sharding": callback_before_sharding,
    "checkpoint before training": checkpoint_before_training,
    "ddp with other signs": ddp_with_other_signs,
    "fsdp few rows": few_rows,
}


def main(rank: int, port: int, file: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=limit)
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        try:
            results[name] = case(rank)
        except Exception as error:  # the other process waits in vain for what follows
            results[name] = "".join(traceback.format_exception(error))
            break
        dist.barrier()
    torch.save(results, f"{file}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

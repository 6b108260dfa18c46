"""What each of two processes does in `test_qat_distributed.py`; results go through a file of rank 0.

Run as `python -m tests.integration.distributed CASE RANK PORT FILE`.
"""

from __future__ import annotations

import datetime
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from olive.qat import OscillationTracker, QATConfig, anneal, convert, prepare
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

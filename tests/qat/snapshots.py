"""What has to be the same of a model after an operation on it has failed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

Snapshot = dict[str, Any]


def snapshot(model: nn.Module) -> Snapshot:
    """All that `prepare` and `convert` may not change when they fail."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "parameters": {name: (id(one), one.requires_grad) for name, one in parameters},
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "hooks": {name: len(module._forward_pre_hooks) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": set(vars(model)),
        "config": None if not hasattr(model, "config") else copy.deepcopy(model.config.to_dict()),
    }


def unchanged(before: Snapshot, model: nn.Module) -> bool:
    after = snapshot(model)
    pairs = zip(before.pop("values").values(), after.pop("values").values(), strict=True)
    values = [
        one.is_meta or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True) for one, other in pairs
    ]
    return before == after and all(values)

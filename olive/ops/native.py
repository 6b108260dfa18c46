"""Numbers by which the compiled modules know types and formats: `Float`, `kInt8` and `Levels` in csrc."""

from __future__ import annotations

import torch

FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LEVEL_TYPES = {**FLOAT_TYPES, torch.int8: 3}
ACTIVATION_FORMATS = {"int8": 0, "ovp4": 1, "ovp8": 2}

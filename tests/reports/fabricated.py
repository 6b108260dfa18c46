"""A report with chosen figures, without a model."""

from __future__ import annotations

from olive.reports import LayerReport, Report
from olive.walk import Skipped


def layer(name: str, **more: object) -> LayerReport:
    values: dict[str, object] = {
        "name": name,
        "kind": "linear",
        "shape": (64, 128),
        "codebook": "adaptive",
        "group_size": 128,
        "parameters": 64 * 128,
        "size_bytes": 64 * 64 + 64 * 2 + 32,
        "outlier_share": 0.0125,
        "plain_share": 0.75,
        "sqnr_db": 20.5,
        **more,
    }
    return LayerReport(**values)  # type: ignore[arg-type]


def report(*layers: LayerReport, skipped: tuple[Skipped, ...] = ()) -> Report:
    return Report("Model", layers, skipped, 0.9, 1_000_000, 3_000_000)


def long_report(depth: int = 32) -> Report:
    return report(
        *(
            layer(f"model.layers.{index}.{key}", sqnr_db=20.0 + index, outlier_share=index / 1000)
            for index in range(depth)
            for key in ("self_attn.q_proj", "mlp.down_proj")
        ),
        layer("model.projection"),
        skipped=tuple(Skipped(f"model.layers.{index}.norm", 128, "vectors only") for index in range(depth)),
    )

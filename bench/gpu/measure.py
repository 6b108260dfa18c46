"""One point of the comparison: every candidate is checked, then all of them take turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from bench.bench_ovp_linear import relative_error
from bench.gpu.candidates import BASELINE, Candidate
from bench.gpu.data import Problem, ends
from bench.gpu.device import Prepared, device_clock, prepare, synchronize
from bench.gpu.results import Results
from bench.timing import take_turns

_SLACK = 1e-5  # of the error allowed, for results that cuBLAS happens to round exactly
_CHECKED_TOKENS = 32  # activation rows at either end whose results are compared


def check(problem: Problem, candidate: Candidate, x: Tensor, limit: float) -> float:
    """The relative error of a candidate on the checked rows of the weight and of the activations.

    Raises:
        ValueError: it is not at most `limit`, or the result has another shape or type.
    """
    out = candidate.run(x, 0)
    shape = (x.shape[0], problem.n)
    if tuple(out.shape) != shape or out.dtype != x.dtype:
        raise ValueError(f"result: expected {x.dtype} {shape}, got {out.dtype} {tuple(out.shape)}")
    tokens = ends(x.shape[0], _CHECKED_TOKENS, x.device)
    expected = candidate.values(x[tokens]) @ candidate.decoded.T
    error = relative_error(out[tokens][:, problem.checked], expected)
    if not error <= limit:
        raise ValueError(f"result: expected a relative error of at most {limit:.2g}, got {error:.2g}")
    return error


def measure(
    op: str,
    problem: Problem,
    m: int,
    candidates: Mapping[str, Candidate],
    results: Results,
    *,
    copy: float,
    seconds: float,
    name: Callable[[str], str] = lambda key: key,
) -> None:
    """Check and time candidates at M rows, with a row each; a wrong or failing one of ours is a failure.

    Args:
        op: as in the CSV.
        problem: the weight.
        m: activation rows.
        candidates: by key; `BASELINE` must be among them.
        results: where rows go.
        copy: bytes per second of a copy.
        seconds: roughly, for all of them.
        name: the backend that the CSV names, from a candidate's key.
    """
    x = problem.activations(m)
    shape: dict[str, Any] = {"m": m, "n": problem.n, "k": problem.k, "dtype": "bfloat16"}
    prepared: dict[str, Prepared] = {}
    baseline_error = check(problem, candidates[BASELINE], x, candidates[BASELINE].tolerance or 0)
    for key, candidate in candidates.items():
        if m * problem.n * problem.k > candidate.most_products:
            continue
        limit = 2 * baseline_error + _SLACK if candidate.tolerance is None else candidate.tolerance
        try:
            check(problem, candidate, x, limit)
            prepared[key] = prepare(partial(candidate.run, x), candidate.copies, problem.device)
        except Exception as error:
            synchronize(problem.device)  # raises if the device is lost; then no figure can be trusted
            if key == BASELINE:
                raise
            report = results.fail if name(key).startswith("olive") else results.missing
            report(op, name(key), error, plan=candidate.plan(m), **shape)
    timings = take_turns(
        {key: lambda _, it=it: it.launch() for key, it in prepared.items()},  # type: ignore[misc]
        seconds,
        clock=device_clock(problem.device),
        calls={key: it.calls for key, it in prepared.items()},
    )
    for key, timing in timings.items():
        candidate = candidates[key]
        rate = candidate.weight_bytes / timing.median
        quantized = {} if key == BASELINE else {"group_size": candidate.group_size}
        ours = {"codebook": "adaptive"} if name(key).startswith("olive") else {}
        results.add(
            op,
            name(key),
            timing,
            plan=candidate.plan(m),
            gb_s=rate / 1e9,
            of_copy=rate / copy,
            tflop_s=2 * m * problem.n * problem.k / timing.median / 1e12,
            speedup=timings[BASELINE].median / timing.median,
            note=prepared[key].note,
            **shape,
            **quantized,
            **ours,
        )

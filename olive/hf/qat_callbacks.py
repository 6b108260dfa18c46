"""Trainer callbacks for quantization-aware training: follow oscillations, and freeze confident weights.

Both act in torch's own hooks on the optimizer, so they see every step and nothing else: under mixed
precision, accumulation of gradients, DDP and FSDP2 as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from olive.qat.annealing import BOUNDARY_RANGE, Annealing, check_boundary_range
from olive.qat.tracking import MOMENTUM, THRESHOLD, OscillationTracker

PREFIX = "qat/"


class OscillationCallback(TrainerCallback):
    """Follows how often weights oscillate, and adds the shares to what the Trainer logs.

    `qat/oscillating` is the share of the low-bit weights whose frequency is above the threshold, and
    `qat/at_boundary` the share within the boundary range; both are in `trainer.state.log_history`. NaN in a
    latent weight stops the training with the layer's name at the next log. What is recorded lies in
    buffers of the model and is saved with it, so that training resumes exactly: build the callback before
    `trainer.train(resume_from_checkpoint=...)`. Where the Trainer shards the model (FSDP2), the buffers are
    sharded when training begins, after a checkpoint is loaded.

    Args:
        model: prepared.
        momentum, threshold, boundary_range: as for `olive.qat.OscillationTracker`.
        picture: file that is drawn anew at each log (`olive.reports.oscillations`); None = no picture.

    Attributes:
        tracker: the tracker, for shares of single layers and histograms.
    """

    def __init__(
        self,
        model: Any,
        *,
        momentum: float = MOMENTUM,
        threshold: float = THRESHOLD,
        boundary_range: float = BOUNDARY_RANGE,
        picture: str | Path | None = None,
    ) -> None:
        self.tracker = OscillationTracker(
            model, momentum=momentum, threshold=threshold, boundary_range=boundary_range
        )
        self._picture = None if picture is None else Path(picture)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to look at the optimizer's steps."""
        self.tracker.attach(kwargs["optimizer"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop looking."""
        self.tracker.detach()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the shares to the logs."""
        shares = {PREFIX + name: share for name, share in self.tracker.shares().items()}
        if logs is not None:
            logs.update(shares)
        if state.log_history:
            state.log_history[-1].update(shares)
        if self._picture is None:
            return
        found = self.tracker.snapshot()  # of processes that share weights each has to take part
        if state.is_world_process_zero:
            from olive.reports.oscillations import draw_oscillations

            draw_oscillations(found, self._picture, history=state.log_history)


class AnnealingCallback(TrainerCallback, ExportableState):
    """Confidence-guided annealing during the whole training, or from a step on (`olive.qat.anneal`).

    Args:
        boundary_range: half width of the range around each threshold in which weights train, in steps.
        start: share of the training's steps after which it begins, 0 to below 1.

    Raises:
        ValueError: a number out of its range; when training begins, a run that is resumed with another
            boundary range, or a model that is not prepared.
    """

    def __init__(self, boundary_range: float = BOUNDARY_RANGE, start: float = 0.0) -> None:
        if not 0 <= start < 1:
            raise ValueError(f"start: expected 0 to below 1, got {start!r}")
        self._boundary_range, self._start = check_boundary_range(boundary_range), start
        self._annealing: Annealing | None = None

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into its checkpoints."""
        arguments = {"boundary_range": self._boundary_range, "start": self._start}
        return {"args": arguments, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse another boundary range than that of the run that is resumed; begin if it is time."""
        self._let_go()
        saved = state.stateful_callbacks.get(type(self).__name__)  # type: ignore[union-attr]
        if saved is not None and state.global_step > 0:
            Annealing.check_state(saved["args"], self._boundary_range)
        self._begin(state, kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin if it is time."""
        self._begin(state, kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop freezing; frozen entries of merged matrices (`qkr`) stay as they are held."""
        self._let_go()

    def _let_go(self) -> None:
        if self._annealing is not None:
            self._annealing.detach()
            self._annealing = None

    def _begin(self, state: TrainerState, kwargs: dict[str, Any]) -> None:
        if self._annealing is None and state.global_step >= self._start * state.max_steps:
            self._annealing = Annealing(kwargs["model"], kwargs["optimizer"], self._boundary_range)

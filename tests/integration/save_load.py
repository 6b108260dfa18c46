"""Run in processes of their own by test_save_load.py: saves or loads a tiny quantized model."""

import json
import os
import signal
import sys


def die(*args: object, **kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save(seed: str, *jobs: str) -> None:
    """Quantize a model, then save it for each job "POINT:PATH" in a child that kills itself at that point.

    The children are forked, as importing everything anew takes most of the time; so this runs on one thread.
    """
    import torch

    torch.set_num_threads(1)
    import olive
    import olive.ptq.grids
    from tests.hf.tiny import tiny_llama

    olive.ptq.grids.PAIR_GRID, olive.ptq.grids.PLAIN_GRID = (0.6, 0.9), (0.8,)
    model = olive.quantize(tiny_llama(int(seed)), olive.QuantConfig(group_size=32))
    for job in jobs:
        point, _, path = job.partition(":")
        child = os.fork()
        if child == 0:
            arm(point)
            model.save_pretrained(path, max_shard_size="16KB")
            os._exit(1)  # it was to die
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, job


def arm(point: str) -> None:
    """Let this process kill itself when a save reaches `point`: just before it writes that file."""
    import transformers
    from transformers import modeling_utils

    write, written = modeling_utils.safe_save_file, 0

    def write_or_die(*args: object, **kwargs: object) -> None:
        nonlocal written
        if point == f"shard {written}":
            die()
        write(*args, **kwargs)
        written += 1

    modeling_utils.safe_save_file = write_or_die
    if point == "config":
        transformers.PreTrainedConfig.save_pretrained = die  # type: ignore[method-assign]
    if point == "generation config":
        transformers.GenerationConfig.save_pretrained = die  # type: ignore[method-assign]
    to_text = json.dumps

    def to_text_or_die(value: object, *args: object, **kwargs: object) -> str:
        if point == "text of config" or (
            point == "index" and isinstance(value, dict) and "weight_map" in value
        ):
            die()  # the file is open, and empty
        return to_text(value, *args, **kwargs)  # type: ignore[arg-type]

    json.dumps = to_text_or_die  # type: ignore[assignment]


def load(path: str, order: str, target: str) -> None:
    """Load with olive imported before or after transformers, and write the logits."""
    if order == "before":
        from transformers import AutoModelForCausalLM

        import olive
    else:
        from transformers import AutoModelForCausalLM

        import olive
    import torch

    from tests.hf.tiny import logits

    model = AutoModelForCausalLM.from_pretrained(path)
    assert olive.QuantConfig(group_size=32) == model.config.quantization_config.quant
    torch.save((logits(model), torch.cat([model(torch.tensor([[t]])).logits for t in (5, 9)])), target)


if __name__ == "__main__":
    {"save": save, "load": load}[sys.argv[1]](*sys.argv[2:])

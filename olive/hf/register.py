"""Makes olive and transformers known to each other, now or as soon as transformers is imported."""

from __future__ import annotations

from types import ModuleType

import wrapt

QUANT_METHOD = "olive"
_HOOKED_MODULE = "transformers.quantizers.auto"
_waiting = False


def _register(auto: ModuleType) -> None:
    """Add config and quantizer to transformers' tables, and transformers to our frameworks.

    Args:
        auto: `transformers.quantizers.auto`.
    """
    from olive.frameworks import Framework, register_framework
    from olive.hf.config import OliveConfig
    from olive.hf.hf_quantizer import OliveHfQuantizer
    from olive.hf.quantizer import (
        load_tokenizer,
        mark_quantized,
        outermost,
        transformers_models,
        unmark_quantized,
    )

    register_framework(
        Framework(
            name="transformers",
            models=lambda model: list(outermost(transformers_models(model)).values()),
            mark=mark_quantized,
            unmark=unmark_quantized,
            tokenizer=load_tokenizer,
        )
    )
    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(OliveConfig)
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(QUANT_METHOD)(OliveHfQuantizer)


def register_when_imported() -> None:
    """Make `from_pretrained` know checkpoints and configs of olive, whichever of the two is imported first.

    Imports neither transformers nor torch. transformers loads its submodules when they are first used, so the
    hook sits on the module that holds the tables: nothing can look a quantizer up before it is imported.
    Calling this again does nothing.
    """
    global _waiting
    if not _waiting:
        _waiting = True
        wrapt.when_imported(_HOOKED_MODULE)(_register)

"""Makes olive and transformers known to each other, now or as soon as transformers is imported."""

from __future__ import annotations

from types import ModuleType

import wrapt

QUANT_METHOD = "olive"
_HOOKED_MODULE = "transformers.quantizers.auto"
_waiting = False


def _register(auto: ModuleType) -> None:
    """Add configs and quantizers to transformers' tables, and transformers to our frameworks.

    Args:
        auto: `transformers.quantizers.auto`.
    """
    from olive.frameworks import Framework, register_framework
    from olive.hf.config import OliveConfig
    from olive.hf.hf_quantizer import OliveHfQuantizer
    from olive.hf.qat_config import QAT_METHOD, OliveQATConfig
    from olive.hf.qat_quantizer import OliveQATHfQuantizer, mark_converted
    from olive.hf.quantizer import (
        load_tokenizer,
        mark_prepared,
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
            mark_prepared=mark_prepared,
            mark_converted=mark_converted,
        )
    )
    methods = (
        (QUANT_METHOD, OliveConfig, OliveHfQuantizer),
        (QAT_METHOD, OliveQATConfig, OliveQATHfQuantizer),
    )
    for method, config, quantizer in methods:
        if method not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
            auto.register_quantization_config(method)(config)
        if method not in auto.AUTO_QUANTIZER_MAPPING:
            auto.register_quantizer(method)(quantizer)


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

"""OliVe: outlier-aware 4-bit quantization of Hugging Face models.

Names are loaded when first used: `import olive` imports neither transformers nor triton and starts no CUDA
work. It does register the "olive" quantizer, now or as soon as transformers is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from olive import eval as eval  # light: its names are lazy as well
from olive import presets as presets  # light likewise
from olive import qat as qat  # light likewise
from olive._lazy import lazy_attributes
from olive.hf.register import register_when_imported

if TYPE_CHECKING:
    from olive.config import QuantConfig as QuantConfig
    from olive.ptq.synthetic import synthetic_windows as synthetic_windows
    from olive.ptq.windows import calibration_windows as calibration_windows
    from olive.quantization import dequantize as dequantize
    from olive.quantization import quantize as quantize
    from olive.reports import report as report

__version__ = "0.1.0"

_PUBLIC = {
    "QuantConfig": "olive.config",
    "calibration_windows": "olive.ptq.windows",
    "dequantize": "olive.quantization",
    "quantize": "olive.quantization",
    "report": "olive.reports",
    "synthetic_windows": "olive.ptq.synthetic",
}
__all__ = [
    "QuantConfig",
    "__version__",
    "calibration_windows",
    "dequantize",
    "quantize",
    "report",
    "synthetic_windows",
]
__getattr__, __dir__ = lazy_attributes(__name__, _PUBLIC)

register_when_imported()

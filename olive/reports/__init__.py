"""What quantization did to a model: figures per layer and in all, as text, JSON and one HTML page."""

from olive.reports.measure import report
from olive.reports.records import LayerReport, Report

__all__ = ["LayerReport", "Report", "report"]

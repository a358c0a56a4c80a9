"""ONNX Runtime, imported with its telemetry turned off."""

import os

# From 1.29 on it reports to its maker which models it loads, unless this is set before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

__all__ = ["ort"]

"""ONNX Runtime itself, imported as it must be."""

import os

# From 1.29 on it tells its maker, unless told not to, which models it loads. Read at import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

__all__ = ["ort"]

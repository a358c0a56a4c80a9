"""Any ONNX model behind a durable job queue."""

__version__ = "0.1.0"

"""ONNX Runtime sessions: load, prove batching, run, stop (the only door to onnxruntime).

Everything here blocks; call it from a thread. `Engine.run` releases the GIL.
"""

from asyncinfer.engine.engine import Engine
from asyncinfer.engine.runner import Stop, Stopped

__all__ = ["Engine", "Stop", "Stopped"]

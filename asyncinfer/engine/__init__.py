"""Loading and running models with ONNX Runtime (the only door to onnxruntime).

All functions here block, so call them from a thread. `Engine.run` releases the GIL.
"""

from asyncinfer.engine.engine import Engine
from asyncinfer.engine.runner import Stop, Stopped

__all__ = ["Engine", "Stop", "Stopped"]

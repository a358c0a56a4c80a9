"""A whole service for your own tests: `with service("churn.onnx") as running: ...`.

    from asyncinfer.testing import service

    def test_my_scorer():
        with service("models/churn.onnx", max_queue=10) as running:
            my_scorer = Scorer(running.url)
            my_scorer.submit_all()
            running.drain()
            assert my_scorer.scores() == [...]

What is served is an ONNX file, a model's folder, an `onnx.ModelProto` or its bytes, several of
them by name (`models={"a": ..., "b": ...}`), a whole folder of models, or with nothing named the
shipped models. It answers for all of them once the block is entered. Jobs and models are in a
temporary folder, the port is a free one, and variables such as REDIS_URL are ignored: only
settings that are given by keyword count. All of it ends with the block, or with this process,
even a killed one.

In an async test use `async with service(...)`, which starts it in a thread, and
`await running.drained()`. For pytest there are fixtures: see `asyncinfer.testing.plugin`.
"""

from asyncinfer.errors import InvalidSetting, ModelRefused, NotDrained, StartError
from asyncinfer.testing.running_service import Running
from asyncinfer.testing.service import Service, service
from asyncinfer.testing.settings import Model

__all__ = [
    "InvalidSetting",
    "Model",
    "ModelRefused",
    "NotDrained",
    "Running",
    "Service",
    "StartError",
    "service",
]

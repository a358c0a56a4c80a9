"""The worker of the plain pattern: pops one job at a time, runs it, stores its result."""

import json
import os
import sys
from typing import cast

import numpy as np
import onnxruntime
import redis


def main(model_path: str) -> None:
    store = redis.Redis.from_url(os.environ["REDIS_URL"], decode_responses=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model_path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    while True:
        popped = store.brpop(["predict_queue"], timeout=1)
        if popped is None:
            continue
        job_id = cast(str, popped[1])
        store.set(f"job:{job_id}:status", "processing")
        data = json.loads(cast(str, store.get(f"job:{job_id}:data")))
        outputs = session.run(None, {name: np.asarray(data, dtype=np.float32)})
        result = {"prediction": int(np.argmax(outputs[-1][0]))}
        result["probabilities"] = outputs[-1][0].tolist()
        store.set(f"job:{job_id}:result", json.dumps(result), ex=3600)
        store.set(f"job:{job_id}:status", "completed", ex=3600)


if __name__ == "__main__":
    main(sys.argv[1])

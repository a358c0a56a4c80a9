"""The API of the plain pattern: a synchronous endpoint, three Redis calls per submit."""

import json
import os
import uuid
from typing import Any

import redis
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

app = FastAPI()
store = redis.Redis.from_url(os.environ["REDIS_URL"], decode_responses=True)


class PredictRequest(BaseModel):
    data: list[list[float]]


@app.post("/predict", status_code=202)
def predict(request: PredictRequest) -> dict[str, str]:
    job_id = str(uuid.uuid4())
    store.set(f"job:{job_id}:data", json.dumps(request.data))
    store.set(f"job:{job_id}:status", "pending")
    store.lpush("predict_queue", job_id)
    return {"job_id": job_id}


@app.get("/job/{job_id}")
def job(job_id: str) -> dict[str, Any]:
    status = store.get(f"job:{job_id}:status")
    if status is None:
        raise HTTPException(404)
    result = store.get(f"job:{job_id}:result") if status == "completed" else None
    return {"job_id": job_id, "status": status, "result": json.loads(str(result or "null"))}


@app.get("/health")
def health() -> dict[str, str]:
    return {"status": "ok"}

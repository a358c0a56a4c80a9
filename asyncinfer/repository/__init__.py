"""Every verb on the queue, one round trip each; the only door to redis.

Split by who calls: `submit` (API), `run` (worker), `upkeep` (both), `inspect` and
`operate` (people).
"""

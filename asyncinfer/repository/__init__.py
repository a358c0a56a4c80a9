"""Every verb on the queue, one round trip each; the only door to redis.

Split by who calls: the API (`submissions`), workers (`claims`, `leases`, `announcements`),
every process (`maintenance`), people (`operations`, `inspect`).
"""

"""Why each default of the router is what it is; ``router/config.py`` has the values and says what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

ROUTER_REASONS: Final[Mapping[str, str]] = {
    "host": "nobody outside of this machine can reach it until you say so; 0.0.0.0 is every address",
    "port": "SGLang's own",
    "prefill_policy": "prompts differ in length a thousandfold, so turns are unfair",
    "decode_policy": "as with prefill workers",
    "default_slo_class": "as patient as the paper's most patient class: who asked for nothing goes before nobody",
    "max_concurrent_requests": "more than a handful of workers hold; beyond it, waiting in one place is fairer",
    "queue_size": "a client learns early that the cluster is full, and tries elsewhere",
    "queue_timeout_secs": "a minute is as long as a person waits",
    "request_timeout_secs": "half an hour: long answers are legitimate, and hung ones must end some day",
    "connect_timeout_secs": "a machine of the same network answers within milliseconds, or not at all",
    "retry_max_retries": "two failures in a row are bad luck, three are a broken cluster",
    "disable_retries": "a lost worker should cost its clients a moment, not an error",
    "max_body_bytes": "64 MiB: a prompt of ten million tokens",
    "max_answer_bytes": "1 GiB: prompt logprobs of long prompts are that large",
    "heartbeat_interval_secs": "a hundred bytes a second cost nothing",
    "heartbeat_dead_secs": "two lost heartbeats in a row are chance, three are not",
    "health_check_interval_secs": "a failed request tells sooner; this finds the idle ones that died",
    "health_check_timeout_secs": "SGLang answers late while it loads or compiles",
    "health_failure_threshold": "one slow answer under load is no death",
    "drain_settle_secs": "no load balancer is in front; with one, take its own check interval",
    "shutdown_drain_secs": "what orchestrators give a process to end by default",
    "api_key": "the port is open to whoever reaches it; a key goes to every process, or comes by --api-key",
    "prometheus_port": "/metrics is answered on the router's own port",
    "log_level": "workers that come and go, and what failed; one line a request only with debug",
    "log_json": "people read it first",
}
"""By field. A new field of the router needs its line here, or it could not be in the file."""

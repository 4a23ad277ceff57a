"""A pool on Ray from a program: started, asked once, scaled, ended. Needs the extra "ray".

    python examples/ray_cluster.py [--ray-address HOST:PORT] --model-path MODEL [SGLang's flags]

On a machine without a GPU, add ``--device cpu``.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import aiohttp

from flowprefill_sglang.cli.up import print_progress
from flowprefill_sglang.cluster.launcher import ClusterSpec
from flowprefill_sglang.cluster.pool_starting import pool_on_ray


async def main() -> None:
    """Start one prefill worker and one decode instance, add a worker, generate."""
    parser = argparse.ArgumentParser(description="A pool on Ray.")
    parser.add_argument("--ray-address", help="the cluster to join (default: a new one on this machine)")
    parser.add_argument("--model-path", type=Path, required=True)
    options, sglang_flags = parser.parse_known_args()
    spec = ClusterSpec(model_path=options.model_path.resolve(), sglang_arguments=tuple(sglang_flags))
    pool = pool_on_ray(spec, options.ray_address, print_progress)
    try:
        await pool.start()
        watching = asyncio.create_task(pool.watch())  # keeps the pool at its size
        await pool.scale(prefill=2, decode=1)  # returns at once; the pool serves meanwhile
        body = {"text": "Once upon a time", "sampling_params": {"max_new_tokens": 16}}
        async with aiohttp.ClientSession() as session, session.post(f"{pool.url}/generate", json=body) as answer:
            print((await answer.json())["text"])
        watching.cancel()
    finally:
        await pool.stop()


if __name__ == "__main__":
    asyncio.run(main())

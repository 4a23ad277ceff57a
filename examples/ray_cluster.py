"""A pool on Ray from a program: started, asked once, ended. Needs the extra "ray".

    python examples/ray_cluster.py MODEL [--ray-address HOST:PORT] [SGLang's flags]

On a machine without a GPU, add ``--device cpu``.
"""

import argparse
import asyncio
from pathlib import Path

import aiohttp

from flowprefill_sglang.cluster.launcher import ClusterSpec
from flowprefill_sglang.cluster.pool_starting import pool_on_ray


async def ask_a_pool(spec: ClusterSpec, ray_address: str | None = None) -> str:
    """Start the pool, keep it at its size while it is used, and end it."""
    pool = pool_on_ray(spec, ray_address, on_progress=lambda event: print(event.name, event.state, event.detail))
    try:
        await pool.start()
        watching = asyncio.create_task(pool.watch())  # replaces what is lost; await pool.scale(4, 2) changes the size
        body = {"text": "Prefill is ", "sampling_params": {"temperature": 0, "max_new_tokens": 24}}
        async with aiohttp.ClientSession() as session, session.post(f"{pool.url}/generate", json=body) as answer:
            text = (await answer.json())["text"]
        watching.cancel()
        return text
    finally:
        await pool.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A pool on Ray.")
    parser.add_argument("model_path", type=Path)
    parser.add_argument("--ray-address", help="the cluster to join (default: a new one on this machine)")
    options, sglang_flags = parser.parse_known_args()
    spec = ClusterSpec(model_path=options.model_path.absolute(), sglang_arguments=tuple(sglang_flags))
    print(asyncio.run(ask_a_pool(spec, options.ray_address)))

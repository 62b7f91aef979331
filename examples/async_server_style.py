"""Serve several clients from one event loop: their texts arrive side by side, and the loop goes on meanwhile.

Run: python examples/async_server_style.py [FOLDER]
"""

import asyncio
import itertools
import sys
import time

import gpt2_edge

PROMPTS = ["The wolf", "The youngest brother", "In the forest", "The queen said"]


async def serve(model: gpt2_edge.Model, client: int, arrivals: list[int]) -> str:
    """Write to one client; a server would send each piece."""
    text = PROMPTS[client]
    async for piece in model.astream(text, max_new_tokens=40, temperature=0.8, top_k=40, seed=client):
        text += piece.text
        arrivals.append(client)
    return text


async def tick(gaps: list[float]) -> None:
    """Do something else every 5 ms, and note how late it came to it."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(0.005)
        gaps.append(time.perf_counter() - before - 0.005)


async def main(folder: str) -> None:
    """Serve all clients at once."""
    arrivals: list[int] = []
    gaps: list[float] = []
    with gpt2_edge.load(folder) as model:
        ticking = asyncio.create_task(tick(gaps))
        for text in await asyncio.gather(*(serve(model, client, arrivals) for client in range(len(PROMPTS)))):
            print(text, end="\n---\n")
        ticking.cancel()
    changes = sum(one != other for one, other in itertools.pairwise(arrivals))
    print(f"{len(arrivals)} pieces, and {changes} times the next one was another client's")
    print(f"{len(gaps)} ticks meanwhile, the latest {1000 * max(gaps):.0f} ms late")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "storyteller"))

"""Threads in which the callers that use asyncio wait for what is computed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Final, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_MOST_THREADS: Final = 64


class AsyncThreads:
    """Threads that are made as they are needed.

    Those of asyncio itself are few, six on two cores: only so many rows would share a step, and nothing else of the app
    would get one of them meanwhile.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="gpt2-edge async")

    async def run(
        self, function: Callable[Arguments, Result], *arguments: Arguments.args, **keywords: Arguments.kwargs
    ) -> Result:
        """Call a function in one of the threads, with the context of the caller; the event loop goes on meanwhile."""
        import asyncio  # here, because most programs have no use for it

        context = copy_context()
        call = lambda: context.run(function, *arguments, **keywords)  # noqa: E731
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

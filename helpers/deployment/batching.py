"""Chips of many requests in one prediction."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from helpers.deployment.runtimes import Predict


class Batches:
    """Predicts chips as they come, together where several wait: dynamic batching.

    Nothing waits for company: while one batch is predicted, the next one gathers. Use `logits_of`
    from one event loop.
    """

    def __init__(self, predict: Predict, batch_size: int):
        """Take a prediction of chips (N, bands, S, S) and the most chips that it is given."""
        self._predict, self._most = predict, batch_size
        self._waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1)  # predictions use all cores: one at a time
        self._worker: asyncio.Task | None = None

    async def logits_of(self, chip: np.ndarray) -> np.ndarray:
        """A chip (bands, S, S) -> its logits (classes,), or what the prediction raised."""
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        answer = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((chip, answer))
        return await answer

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            with suppress(asyncio.QueueEmpty):
                while len(batch) < self._most:
                    batch.append(self._waiting.get_nowait())
            chips = np.stack([chip for chip, _ in batch])
            try:
                logits = await loop.run_in_executor(self._thread, self._predict, chips)
                answers = [
                    (future.set_result, row) for (_, future), row in zip(batch, logits, strict=True)
                ]
            except Exception as error:  # a runtime may raise anything; the requests hear of it
                answers = [(future.set_exception, error) for _, future in batch]
            for (_, future), (give, what) in zip(batch, answers, strict=True):
                if not future.done():  # its client may have gone
                    give(what)

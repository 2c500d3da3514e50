"""Measurements spread over devices that are alike."""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Callable, Sequence

from profilers.errors import DeviceError
from profilers.profile import Anchor, Step
from profilers.table import Measurement


def run_steps(
    steps: Sequence[Step],
    anchors: list[Anchor],
    append: Callable[[list[Measurement]], None],
    progress: Callable[[int, int, str], None],
    *,
    over: Callable[[], bool] = lambda: False,
) -> bool:
    """Run every step on one of the devices, and append what it gives; False where `over` said to stop.

    One thread for each device; `append` and `progress` are called in the caller's. A device that fails is taken out of
    `anchors` with a warning and hands its step to the others; DeviceError where the last one fails.
    """
    if len(anchors) == 1:
        for index, step in enumerate(steps):
            if over():
                return False
            progress(index, len(steps), step.name)
            append(step.run(anchors[0]))
        return True

    waiting: queue.SimpleQueue[Step] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[Anchor, Step, list[Measurement] | BaseException]] = queue.SimpleQueue()
    ended = threading.Event()
    for step in steps:
        waiting.put(step)

    def work(anchor: Anchor) -> None:
        while not ended.is_set():
            try:
                step = waiting.get(timeout=0.05)
            except queue.Empty:
                continue
            try:
                results.put((anchor, step, step.run(anchor)))
            except BaseException as error:  # handed to the caller's thread, whatever it is
                results.put((anchor, step, error))
                return

    threads = [threading.Thread(target=work, args=(anchor,), daemon=True) for anchor in anchors]
    for thread in threads:
        thread.start()
    done = 0
    try:
        while done < len(steps):
            if over():
                return False
            try:
                anchor, step, found = results.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(found, DeviceError) and len(anchors) > 1:
                anchors.remove(anchor)
                warnings.warn(f"a device is left out from here on: {found}", stacklevel=2)
                waiting.put(step)
            elif isinstance(found, BaseException):
                raise found
            else:
                progress(done, len(steps), step.name)
                append(found)
                done += 1
        return True
    finally:
        ended.set()
        for thread in threads:
            thread.join()  # what is being measured is short, and its device is left in order
        while not results.empty():  # measured while the caller was told to stop
            _, _, found = results.get()
            if not isinstance(found, BaseException):
                append(found)

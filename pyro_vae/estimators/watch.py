"""What must not come up in a computation, looked for without waiting for a GPU."""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

LATE = 4  # findings that may be on their way at once


class Watch:
    """Raises what was found to be wrong: on a CPU at once, on a GPU when a few later findings are on their way.

    To ask a GPU for a number is to wait until it has done all that it was told to, and to leave it idle until it is
    told more.
    """

    def __init__(self) -> None:
        self.waiting: deque[tuple[Tensor, torch.cuda.Event, Callable[[], Exception]]] = deque()

    def __call__(self, is_wrong: Tensor, error: Callable[[], Exception]) -> None:
        """Take in a finding, a boolean without dimensions, and what to raise if it is true."""
        if not is_wrong.is_cuda:
            if bool(is_wrong):
                raise error()
            return
        answer, event = is_wrong.to("cpu", non_blocking=True), torch.cuda.Event()
        event.record(torch.cuda.current_stream(is_wrong.device))
        self.waiting.append((answer, event, error))
        self._settle(LATE)

    def end(self) -> None:
        """Raise what is still on its way, if it is true."""
        self._settle(0)

    def _settle(self, left: int) -> None:
        while len(self.waiting) > left:
            answer, event, error = self.waiting.popleft()
            event.synchronize()
            if bool(answer):
                raise error()

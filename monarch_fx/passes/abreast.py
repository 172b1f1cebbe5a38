"""One model, many batches -> runs side by side: none goes on to its next stop before the others have come to theirs.

A run is a thread that rests wherever the model's own code is, so that any Python model can be walked through product by
product, without a graph. Only one of the threads runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from monarch_fx.passes.inputs import Inputs
from monarch_fx.passes.losses import attention_mask

_HERE = threading.local()


class _CancelledError(BaseException):
    """Ends a run that nobody waits for; a model's own code doesn't catch it."""


class Run:
    """A model on one batch, without gradients.

    Attributes:
        at: The stop that it rests at; None before the first.
        x: What it stopped with.
        mask: Which tokens of the batch count.
        done: Whether the model has returned.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self.mask = attention_mask(inputs.kwargs)
        self.at: str | None = None
        self.x: Tensor | None = None
        self.done, self._cancelled = False, False
        self._error: BaseException | None = None
        self._go, self._rests = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, daemon=True)

    def resume(self) -> None:
        """Lets it run to its next stop, or to the end; an error of the model is raised here."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._rests.acquire()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        if self._thread.ident is not None:
            self._cancelled = True
            self._go.release()
            self._thread.join()

    def stop(self, at: str, x: Tensor) -> None:
        """Rests until it is resumed; called from inside the model."""
        self.at, self.x = at, x
        self._rests.release()
        self._go.acquire()
        self.x = None
        if self._cancelled:
            raise _CancelledError

    def _main(self) -> None:
        _HERE.run = self
        try:
            with torch.no_grad():
                self.model(*self.inputs.args, **self.inputs.kwargs)
        except _CancelledError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.done = True
            self._rests.release()


def this_run() -> Run:
    """The run that the calling code is in."""
    run: Run = _HERE.run
    return run


def side_by_side(runs: Sequence[Run], order: Sequence[str]) -> Iterator[tuple[str, list[Run]]]:
    """The stops, in the given order where runs rest at different ones, each with the runs that rest there; these go on
    when the next is asked for."""
    moving = list(runs)
    try:
        while True:
            for run in moving:
                run.resume()
            resting = {run: run.at for run in runs if not run.done and run.at is not None}
            if not resting:
                return
            at = min(resting.values(), key=order.index)
            moving = [run for run in resting if run.at == at]
            yield at, moving
    finally:
        for run in runs:
            run.cancel()

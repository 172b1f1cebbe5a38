"""One model, many batches -> runs side by side: none goes on to its next stop before the others have come to theirs.

A run is a thread that rests wherever the model's own code is, so that any Python model can be walked through product by
product, without a graph. Only one of the threads runs at a time.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from monarch_fx.errors import ConfigError
from monarch_fx.passes.inputs import Inputs

_HERE = threading.local()


class _CancelledError(BaseException):
    """Ends a run that nobody waits for; a model's own code doesn't catch it."""


class _Surroundings:
    """What Python and PyTorch keep for each thread by itself, as the thread that makes this has it."""

    def __init__(self) -> None:
        self.variables = contextvars.copy_context()
        self._device = torch.get_default_device()
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
        ]
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # and the current GPU

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if torch.get_default_device() != self._device:
                stack.enter_context(self._device)
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            yield


class Run:
    """A model on one batch, without gradients, as the thread that makes this would run it.

    Attributes:
        at: The stop that it rests at; None before the first.
        x: What it stopped with.
        mask: Which tokens of the batch count.
        done: Whether the model has returned.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self.mask = inputs.mask(model)
        self.at: str | None = None
        self.x: Tensor | None = None
        self.done, self._cancelled = False, False
        self._error: BaseException | None = None
        self._surroundings = _Surroundings()
        self._go, self._rests = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._surroundings.variables.run, args=(self._main,), daemon=True)

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
        if not self._cancelled:  # else it was told already, and the model's code goes on nevertheless
            self.at, self.x = at, x
            self._rests.release()
            self._go.acquire()
            self.x = None
        if self._cancelled:
            raise _CancelledError

    def _main(self) -> None:
        _HERE.run = self
        try:
            with self._surroundings.here():
                self.inputs.into(self.model)
        except _CancelledError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.done = True
            self._rests.release()


def this_run() -> Run:
    """The run that the calling code is in.

    Raises:
        ConfigError: A thread that the model itself has made calls it.
    """
    run: Run | None = getattr(_HERE, "run", None)
    if run is None:
        raise ConfigError("anchor can't follow a model that computes products in threads of its own: leave it out.")
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

"""The device: one thread that does all of its work, or a caller in the thread's place while it rests."""

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Device(Executor):
    """One thread runs every torch operation: each thread that does gets an OpenMP team of its own.

    The way to that thread and back costs some 100 us, of which a small model's lone image takes notice.
    ``run_here`` is for that.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "device")
        self._at_work = Lock()
        self._counting, self._submitted, self._begun = Lock(), 0, 0

    @property
    def waiting(self) -> bool:
        """Whether the thread has something to do after what it does."""
        return self._submitted > self._begun

    def submit(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Have the thread call it, after all that was submitted before."""
        with self._counting:
            self._submitted += 1
        return self._thread.submit(self._locked, call, *args, **kwargs)

    def run_here(self, call: Callable[[], T]) -> "Future[T] | None":
        """Call it on the caller's thread; None, and nothing is called, if the device is at work."""
        if not self._at_work.acquire(blocking=False):
            return None
        done: Future[T] = Future()
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001 - as an executor does: whoever takes the result gets it
            done.set_exception(error)
        finally:
            self._at_work.release()
        return done

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the thread, as an executor does."""
        self._thread.shutdown(wait, cancel_futures=cancel_futures)

    def _locked(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self._begun += 1
        with self._at_work:
            return call(*args, **kwargs)

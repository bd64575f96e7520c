"""What one running server holds: the model on its device, the queue, the store, the version it serves."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Sequence
from functools import partial
from math import nan

from starlette.requests import HTTPConnection

from defense import DefenseError, NeuronImportance, check_dataset, load_importance
from importance_store import (
    ChangeWatcher,
    ConnectedStore,
    NoActiveImportance,
    StoreError,
    StoreUnavailable,
    VersionConflict,
)
from service.answers import Answer, BatchRun, Classified
from service.batching import Batcher
from service.compilers import EngineError
from service.decoding import Decoder
from service.device import Device
from service.errors import Draining, NotReady
from service.jobs import RankingJobs
from service.metrics import Metrics
from service.predictor import Inputs, Pixels, Predictor, ServedDefense
from service.schemas import RankRequest
from service.settings import Settings
from service.store_monitor import StoreMonitor
from service.stores import store_of
from service.worker import WorkerSupervisor

logger = logging.getLogger(__name__)

REOPEN_S = 1.0


class Runtime:
    """Starts, holds and stops the parts; ``start`` and ``stop`` run on the event loop."""

    predictor: Predictor
    batcher: Batcher[ServedDefense, Pixels, Answer]

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self._device = Device()
        self._store: ConnectedStore | None = None
        self._watcher: ChangeWatcher | None = None
        self._monitor: StoreMonitor | None = None
        self._supervisor: WorkerSupervisor | None = None
        self._jobs: RankingJobs | None = None
        self._opening: asyncio.Task[None] | None = None
        self.started = False
        self.served: ServedDefense | None = None
        self.active_version: str | None = None
        self.problem: str | None = "no importance has been loaded yet"
        self.store_up = False
        self.leaving = False  # not ready, so that load balancers send requests elsewhere; what comes is still answered
        self.draining = False
        self.address = f"http://{settings.host}:{settings.port}"  # corrected when a free port was asked for
        self.fatal: BaseException | None = None

    @property
    def store(self) -> ConnectedStore:
        """The importance store.

        Raises:
            NotReady: it could not be reached yet.
        """
        if self._store is None:
            raise NotReady(f"the importance store cannot be reached ({self.problem}); start it or check IGD_REDIS_URL")
        return self._store

    @property
    def jobs(self) -> RankingJobs:
        """The ranking jobs.

        Raises:
            NotReady: the store they wait in could not be reached yet.
        """
        if self._jobs is None:
            raise NotReady(f"the job queue cannot be reached ({self.problem}); start it or check IGD_REDIS_URL")
        return self._jobs

    def check_rank_request(self, request: RankRequest) -> None:
        """Refuse at once what a worker would only find out later.

        Raises:
            DefenseError: no such dataset or layer.
        """
        check_dataset(request.dataset, self.settings.datasets)
        if request.layer is not None:
            self.predictor.split.find_layer(request.layer)

    def check_importance(self, importance: NeuronImportance) -> None:
        """Refuse an importance that cannot be served; to be called from outside the event loop.

        Raises:
            DefenseError: it does not fit this model.
        """
        # On the device thread: tracing a new layer patches torch's modules, and a prediction beside it would break.
        self._device.submit(self.predictor.check, importance).result()

    @property
    def defense(self) -> ServedDefense:
        """What predictions are made with.

        Raises:
            NotReady: shutting down, or there is no importance: nothing is served undefended in silence.
        """
        if self.draining:
            raise Draining("the server is shutting down; send the request to another replica, or again in a moment")
        if self.served is None:
            raise NotReady(f"not ready to serve defended predictions: {self.problem}")
        return self.served

    async def start(self) -> None:
        """Load the model, start the dispatcher, open the store and serve its active importance.

        Raises:
            DefenseError: the model directory cannot be served.
            StoreError: the store refuses us, which waiting will not mend.
        """
        self.started = True
        settings = self.settings
        self.predictor = await asyncio.get_running_loop().run_in_executor(self._device, Predictor.of, settings)
        self._decoder = Decoder(
            self.predictor.config.input, threads=settings.decode_threads, max_pixels=settings.max_pixels
        )
        self.batcher = Batcher(
            self._run_batch,
            self._device,
            max_batch_size=settings.max_batch_size,
            max_queue=settings.max_queue,
            max_wait_s=settings.max_wait_ms / 1000,
            in_place=lambda defense: defense.runs_on_any_thread,
            on_death=self._die,
            on_taken=self.metrics.observe_waits,
            prepare=self.predictor.inputs,
        )
        self.batcher.start()
        self.metrics.watch_queue(lambda: self.batcher.depth, lambda: self.batcher.in_flight)
        self.metrics.watch_model(self.predictor.config.labels, self.predictor.device)
        try:
            await asyncio.to_thread(self._open_store)
        except StoreUnavailable as error:
            logger.warning("starting without the importance store, trying again every %g s: %s", REOPEN_S, error)
            self.problem = str(error)
            self._opening = asyncio.create_task(self._keep_opening_store())

    async def stop(self) -> None:
        """Answer what was admitted, then let go of everything."""
        if self._opening:
            self._opening.cancel()
        # A server that was told to stop has waited for them already, for as long as it may.
        await self.batcher.drain(0 if self.leaving else self.settings.drain_s)
        await asyncio.to_thread(self._close_store)
        self._decoder.shutdown()
        self._device.shutdown(wait=False, cancel_futures=True)
        self.metrics.thread.shutdown(wait=False)

    async def classify(self, defense: ServedDefense, images: list[bytes] | Pixels) -> Classified:
        """The rows of each image, and the batches they were in.

        Args:
            images: files to decode, or pixels [n, H, W, C].

        Raises:
            QueueFull, BadImage, TooLarge, Unprocessable: see ``service.errors``.
        """
        with self.batcher.admit(len(images)):
            if isinstance(images, list):
                with self.metrics.stage("decode"):
                    pixels = await self._decoder.decode(images)
            else:
                pixels = list(images)
            queued_at = time.perf_counter()
            answers = await self.batcher.submit(defense, pixels)
            return Classified([a.rows for a in answers], [a.batch for a in answers], queued_at)

    def enqueue(self, defense: ServedDefense, image: bytes | Pixels) -> "asyncio.Future[Answer]":
        """``classify``, for a caller that is no task: one image, for which it holds a place in the queue.

        Args:
            image: a file, or pixels [H, W, C].

        Raises:
            NotOnTheSpot: the file is to be decoded elsewhere. BadImage, Unprocessable: it is at fault.
        """
        if isinstance(image, bytes):
            with self.metrics.stage("decode"):
                image = self._decoder.on_the_spot(image)
        return self.batcher.enqueue(defense, [image])[0]

    def _run_batch(self, defense: ServedDefense, inputs: Inputs) -> Sequence[Answer]:
        rows = self.predictor.both_passes(defense, inputs)
        run = BatchRun(len(rows), inputs.began_s, time.perf_counter(), defense.engine.stage_seconds())
        self.metrics.observe_batch(rows, run.stage_seconds)
        return [Answer(row, run) for row in rows]

    def _open_store(self) -> None:
        with self.metrics.store.timed("open"):
            store = store_of(self.settings)
        try:
            self._publish_bundled_importance(store)
            self._activate(store, store.active_version())
        except BaseException:
            store.close()
            raise
        self._store = store
        self._store_is_up(True)
        self._watcher = store.watch(on_change=partial(self._activate, store), on_store_up=self._store_is_up)
        self._watcher.start()
        self._jobs = RankingJobs(store.new_client(), store.model)
        self._monitor = StoreMonitor(store, self._jobs, self.metrics.store, self.metrics.jobs)
        self._monitor.start()
        if self.settings.worker and self._supervisor is None:
            self._supervisor = WorkerSupervisor(self.settings.environment())
            self._supervisor.start()

    async def _keep_opening_store(self) -> None:
        while True:
            await asyncio.sleep(REOPEN_S)
            try:
                return await asyncio.to_thread(self._open_store)
            except StoreUnavailable as error:
                self.problem = str(error)
            except Exception as error:  # noqa: BLE001 - as at the start, where it ends the process as well
                return self._die(error)

    def _close_store(self) -> None:
        if self._supervisor:
            self._supervisor.stop()
        if self._monitor:
            self._monitor.stop()
        if self._watcher:
            self._watcher.stop()
        if self._store:
            self._store.close()

    def _publish_bundled_importance(self, store: ConnectedStore) -> None:
        """Publish the model directory's own importance into an empty store, so that a new installation serves."""
        if store.active_version() is not None:
            return
        try:
            importance = load_importance(self.settings.model)
            if importance is not None:
                self.check_importance(importance)
                version = store.publish(importance, expected_active=None)
                logger.info("published the importance of %s as version %s", self.settings.model, version)
        except VersionConflict:
            logger.info("another replica published first")
        except DefenseError as error:
            logger.error("the importance of %s is not published: %s", self.settings.model, error)

    def _activate(self, store: ConnectedStore, version: str | None) -> None:
        """Serve a version from the next admitted request on; what is wrong with it leaves the old one in place."""
        self.active_version = version
        if self.served and self.served.version == version:
            self.problem = None
            return
        try:
            with self.metrics.store.timed("load"):
                loaded = store.load(version, model_digest=self.predictor.model_digest)
            served = self._device.submit(self.predictor.prepare, loaded.version, loaded.importance).result()
        except StoreUnavailable:
            raise  # the watcher tries again
        except (StoreError, DefenseError) as error:
            self.problem = str(error)
            command = f"; to mend it: igd rank --model {self.settings.model}"
            says_itself = isinstance(error, NoActiveImportance | EngineError)  # what is to be done
            logger.error("version %s is not served: %s%s", version, error, "" if says_itself else command)
            return
        self.served, self.problem = served, None
        self._show_served(served)
        logger.info("serving importance %s (%s at %s)", version, served.importance.method, served.importance.layer)

    def _show_served(self, served: ServedDefense) -> None:
        predictor, metrics = self.predictor, self.metrics
        dtype = str(served.dtype).removeprefix("torch.")
        metrics.show_model(
            model=predictor.config.name,
            digest=predictor.model_digest,
            device=str(predictor.device),
            dtype=dtype,
            compiler=served.compiler,
            first_pass="int8" if served.int8_first_pass else dtype,
        )
        metrics.show_importance(served.version, served.importance, predictor.config.defense.top_k)
        metrics.agreement.set(nan if served.agreement is None else served.agreement)

    def _store_is_up(self, up: bool) -> None:
        self.store_up = up
        self.metrics.store.up.set(up)

    def _die(self, error: BaseException) -> None:
        """End the process in order, with a non-zero code: an orchestrator starts a sound one."""
        self.fatal = error
        logger.critical("ending the server: %s", error)
        os.kill(os.getpid(), signal.SIGTERM)


def runtime_of(connection: HTTPConnection) -> Runtime:
    """The runtime of the application that serves this request."""
    runtime: Runtime = connection.app.state.runtime
    return runtime

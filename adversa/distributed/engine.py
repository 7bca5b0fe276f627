"""RayEngine: an embedded Ray on this machine, or the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import psutil
import ray

from adversa import distributed
from adversa.config import Cluster
from adversa.distributed import nodes, search, start, stream, training
from adversa.distributed.pool import Actors
from adversa.distributed.search import Concurrency
from adversa.engine import resources as engine_resources
from adversa.engine.fit import unfinished
from adversa.engine.interface import FitJob, Trial
from adversa.engine.tasks import Done, Make, Name, Part, Report, Share, row_name
from adversa.engine.trials import TrialQueue, in_turn
from adversa.engine.worker_pool import work_off
from adversa.run.control import NULL_HANDLE, RunHandle
from adversa.run.step_folder import is_finished
from adversa.storage.arrays import check_room
from adversa.storage.path import StoragePath, rmtree
from adversa.types import UserError

if TYPE_CHECKING:
    from adversa.training.precision import Hardware

AGAIN = "run the same command again, finished parts are kept"
LINGER = 5.0  # seconds that Ray's processes have to end when it is shut down


class RayEngine:
    """The Engine on Ray: Data for map_batches, actors for map_parts, Train for fit, Tune for
    search.
    """

    name = "ray"
    handle: RunHandle = NULL_HANDLE

    def __init__(
        self,
        cluster: Cluster,
        run: StoragePath,
        image_bytes: int,
        verbose: bool = False,
        inside: bool = False,
    ) -> None:
        """image_bytes: of one decoded image, to size the stream's blocks; inside: in a worker of a
        cluster, which has a Ray and keeps it. UserError where no Ray can be had.
        """
        self.cluster, self.image_bytes = cluster, image_bytes
        self.storage = run / ".ray-train"
        self.inside, self.embedded = inside, not inside and distributed.address() is None
        self.started: dict[
            str, float
        ] = {}  # when the stages of the last launch's start-up were over; benchmarks/training.py
        if not inside:
            start.start(cluster, verbose)
        stream.quiet(verbose)
        resources: dict[str, float] = ray.cluster_resources()
        self.gpus, self.cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        engine_resources.refuse(
            engine_resources.faults(self._machines(), cluster, grows=not self.embedded)
        )

    def tasks(self, model: bool = False) -> int:
        return engine_resources.tasks(self.cpus, self.gpus, model)

    def samplers(self) -> int:
        room = self._room()
        return min(self.cluster.samplers or room, room)

    def _samplers_wanted(self) -> int:
        """As many as fit now; more, on a cluster that was asked for more: the others join when
        nodes come.
        """
        if not self.embedded:
            return self.cluster.samplers or self._room()
        if not nodes.alive():  # actors would wait for it for ever
            raise UserError(f"Ray on this machine has died; {AGAIN}")
        return self.samplers()

    def _room(self) -> int:
        """How many samplers fit, machine by machine."""
        return sum(
            engine_resources.samplers_on(m.cpus, m.gpus, self.cluster, self.gpus > 0)
            for m in self._machines()
        )

    def _machines(self) -> list[engine_resources.Node]:
        """Those that are there now; an embedded Ray has the one."""
        return (
            [engine_resources.Node("this machine", self.cpus, self.gpus)]
            if self.embedded
            else nodes.there()
        )

    def map_batches(
        self,
        make: Make,
        parts: Sequence[Part],
        out: StoragePath,
        report: Report,
        model: bool = False,
    ) -> list[Done]:
        if not (model and self.gpus):
            return stream.map_batches(make, parts, out, report)
        share = engine_resources.GPU_SHARE
        return stream.map_batches(make, parts, out, report, self.tasks(model), share)

    def map_parts(
        self,
        make: Make,
        parts: Sequence[Part],
        out: StoragePath,
        report: Report,
        name: Name = row_name,
    ) -> list[Share]:
        c = self.cluster
        options = engine_resources.sampler_asks(c, self.gpus > 0)
        actors = Actors(make, out, options, c.sampler_threads, c.pin_samplers)
        return work_off(actors, parts, out, report, self._samplers_wanted, c.attempts, name)

    def fit(self, jobs: Sequence[FitJob]) -> None:
        """As the Engine says. A launch whose controller dies is made anew, with what is left; Ray
        Train replaces its workers.
        """
        lost = ""
        for _ in range(self.cluster.training_attempts):
            if not (
                todo := unfinished(jobs, self.handle)
            ):  # what died right after its manifest has left its checkpoint
                return
            if self.embedded:
                for folder in {f for j in todo if not j.feed.latent_std for f in j.feed.folders}:
                    check_room(folder, self.image_bytes)
            try:
                self.started = training.fit(todo, self.storage, self.image_bytes, self.group())
                unfinished(todo, self.handle)
                return
            except training.ControllerLost as e:
                lost = str(e)
            finally:
                rmtree(self.storage, missing_ok=True)
        raise UserError(
            f"Ray Train was lost {self.cluster.training_attempts} times ({lost}); {AGAIN}"
        )

    def search(self, trials: Sequence[Trial], report: Report) -> None:
        """As the Engine says; a trial whose worker dies is begun again where its folders end.

        Trials of several workers come one after the other, each with a launch of Ray Train of its
        own: such a group is as large as the cluster, or nearly, and Ray Data's tasks find no room
        within a trial of Tune.
        """
        if not any(not is_finished(t.out) for t in trials):
            return
        if self.cluster.training_workers > 1:
            queue = TrialQueue(trials)
            for _ in in_turn(queue, self, report):
                self.handle.poll()
            queue.settle()
            return
        with self.tuning() as (on, storage):
            search.search(trials, on, storage, report, self.handle)
        if self.embedded:
            search.idle()

    @contextlib.contextmanager
    def tuning(self) -> Iterator[tuple[Concurrency, StoragePath]]:
        """The concurrency of a search by Ray Tune, and a place for what Tune keeps, which goes with
        it.
        """
        storage = self.storage.with_name(".ray-tune")
        try:
            yield search.concurrency(self.cluster, self.gpus), storage
        finally:
            rmtree(storage, missing_ok=True)

    def group(self) -> training.WorkerGroup:
        """The workers of a training. UserError where an embedded Ray, which cannot grow, has no
        room for them.
        """
        c = self.cluster
        if self.embedded and (fault := engine_resources.worker_fault(self.cpus, self.gpus, c)):
            raise UserError(fault)
        resources = engine_resources.worker_asks(self.cpus, self.gpus, c.training_workers)
        workers = (c.training_workers_min or c.training_workers, c.training_workers)
        return training.WorkerGroup(
            workers, resources, c.training_attempts, c.training_threads, self.embedded
        )

    def hardware(self) -> Hardware:
        share = engine_resources.GPU_SHARE if self.gpus else 0
        # A task that asks for nothing runs on the head, which may do no work of its own.
        remote = ray.remote(num_cpus=0 if self.embedded else 1, num_gpus=share)(_hardware)
        found: Hardware = ray.get(remote.remote())
        return found

    def close(self) -> None:
        """End Ray. Now and then an actor's process, told to end, locks up in its own destructors,
        and would stay behind.
        """
        if self.inside:
            return
        own = ray_processes() if self.embedded else []
        ray.shutdown()
        end(own, LINGER)


def _hardware() -> Hardware:
    """Of the worker that it runs in."""
    from adversa.training.precision import hardware

    return hardware()


def ray_processes() -> list[psutil.Process]:
    """Ray's workers and actors below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue  # it ended while we looked
    return found


def end(processes: Sequence[psutil.Process], seconds: float) -> None:
    """Wait for processes that are about to end, and kill those that have not after so long."""
    for process in psutil.wait_procs(processes, timeout=seconds)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended just now
            process.kill()

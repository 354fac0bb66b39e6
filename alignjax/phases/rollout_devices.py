"""Which devices sample, and how the weights that train come to lie there."""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from alignjax.core.types import Params
from alignjax.models import Model, lora
from alignjax.phases.rollout_config import RolloutConfig
from alignjax.sharding import copied, moved, sent, shardings

T = TypeVar("T")


class RolloutDevices:
    """The devices that sample.

    Attributes:
      mesh: of them.
      is_other: it is not the one that trains.
      is_apart: nor are its devices.
      is_far: nor their processes.
    """

    def __init__(self, config: RolloutConfig, mesh: Mesh):
        """Args: mesh: of the devices that train. Raises: UserError: as `RolloutConfig`."""
        self.mesh, self.is_apart = config.sampling_mesh(mesh), config.is_apart
        self.is_far = config.processes > 0
        self.is_other = self.mesh != mesh
        self._thread = ThreadPoolExecutor(1, "rollouts", self._begin)
        self._ident: int | None = None

    def model(self, model: Model) -> Model:
        """The model, computed here."""
        return dataclasses.replace(model, mesh=self.mesh)

    def run(self, function: Callable[[], T]) -> T:
        """What the function returns, which computes here: where they are apart from those that
        train in the one thread that does, after what it was given before."""
        if not self.is_apart or threading.get_ident() == self._ident:
            return function()
        return self.submit(function).result()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """To be run by the thread. There is one, for two could give each device, or each process,
        another order of work, in which they would wait for each other for ever."""

        def run() -> T:
            # Small arrays, such as keys, would otherwise be made on a device that trains, behind
            # what it is doing.
            with jax.default_device(next(iter(self.mesh.local_devices), None)):
                return function()

        return self._thread.submit(run)

    def close(self) -> None:
        """Returns when the thread is done with what it has begun; it begins nothing else."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _begin(self) -> None:
        self._ident = threading.get_ident()


class Weights:
    """What trains of a model -> all that it computes with, where it samples.

    On the devices that train, what is moved is a copy for as long as somebody holds it. Apart from
    them what never trains is moved once.
    """

    def __init__(self, model: Model, frozen: Params | None, devices: RolloutDevices):
        """Args: frozen: what does not train of the model, if anything (`Policy.frozen`)."""
        self._devices = devices
        trained, rest = model.logical_axes(), {}
        if frozen is not None:
            trained, rest = lora.split(trained)
        self._trained_axes, self._frozen_axes = trained, rest
        self._frozen = frozen
        if frozen is not None and devices.is_apart:
            self._frozen = devices.run(lambda: self._moved(frozen, rest))

    def push(self, params: Params) -> Future[Params]:
        """What trains, sent here (`sharding.sent`) while others compute here; from far it comes in
        its turn. Nobody may compute where it is until then.

        Args:
          params: as they train, or what `kept` gave.
        """

        def send() -> Params:
            return sent(params, shardings(self._trained_axes, self._devices.mesh, params))

        if self._devices.is_far:
            return self._devices.submit(send)
        found: Future[Params] = Future()
        found.set_result(send())
        return found

    def kept(self, params: Params, here: Params) -> Params:
        """What a state keeps of parameters that were pushed, and are here now.

        Args:
          params, here: as they train, and as `push` gave them.
        """
        # A checkpoint has no arrays but those of the processes that train.
        return copied(params) if self._devices.is_far else here

    def __call__(self, params: Params) -> Params:
        """All that the model computes with.

        Args:
          params: what trains of it, anywhere.
        """
        trained = self._moved(params, self._trained_axes)
        if self._frozen is None:
            return trained
        return lora.combine(self._moved(self._frozen, self._frozen_axes), trained)

    def _moved(self, params: Params, axes: Any) -> Any:
        if not self._devices.is_other:
            return params
        return moved(params, shardings(axes, self._devices.mesh, params))

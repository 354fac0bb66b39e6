"""Which devices sample, and how the weights that train come to lie there."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from alignjax.core.types import Params
from alignjax.models import Model, lora
from alignjax.phases.rollout_config import RolloutConfig
from alignjax.sharding import moved, shardings


class RolloutDevices:
    """The devices that sample.

    Attributes:
      mesh: of them.
      is_other: it is not the one that trains.
      is_apart: nor are its devices.
    """

    def __init__(self, config: RolloutConfig, mesh: Mesh):
        """Args: mesh: of the devices that train. Raises: UserError: as `RolloutConfig`."""
        self.mesh, self.is_apart = config.sampling_mesh(mesh), config.devices > 0
        self.is_other = self.mesh != mesh
        self._lock = threading.Lock()

    def model(self, model: Model) -> Model:
        """The model, computed here."""
        return dataclasses.replace(model, mesh=self.mesh)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """To be entered by who computes here: one thread at a time, for two could give each device
        another order of work, in which they would wait for each other for ever."""
        if not self.is_apart:
            yield
            return
        # Small arrays would otherwise be made on a device that trains, behind what it is doing.
        with self._lock, jax.default_device(self.mesh.devices.flat[0]):
            yield


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
            self._frozen = self._moved(frozen, rest)

    def push(self, params: Params) -> Params:
        """What trains, here. As it came where it is here already."""
        return self._moved(params, self._trained_axes)

    def __call__(self, params: Params) -> Params:
        """All that the model computes with.

        Args:
          params: what trains of it, anywhere.
        """
        trained = self.push(params)
        if self._frozen is None:
            return trained
        return lora.combine(self._moved(self._frozen, self._frozen_axes), trained)

    def _moved(self, params: Params, axes: Any) -> Any:
        if not self._devices.is_other:
            return params
        return moved(params, shardings(axes, self._devices.mesh, params))

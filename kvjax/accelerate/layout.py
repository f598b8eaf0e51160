"""How many devices share what: the sizes of a mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from kvjax.config import ModelConfig
from kvjax.mesh import AXES


@dataclass(frozen=True)
class Layout:
    """Devices along each axis; their product is the number of devices.

    Args:
        data: groups that have different rows of the batch.
        context: devices that have different slots of the same rows; what each finds is merged by `lse`.
        heads: devices that have different heads of the same rows, with their share of every kernel.

    Raises:
        ValueError: for a size that is not a whole number of at least 1.
    """

    data: int = 1
    context: int = 1
    heads: int = 1

    def __post_init__(self):
        for name, size in asdict(self).items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"Layout: `{name}` must be a whole number of devices, at least 1, got {size!r}")

    @property
    def devices(self) -> int:
        return prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """In the order of the mesh's axes."""
        return self.data, self.context, self.heads

    def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh, with axes `data`, `context` and `heads`.

        Args:
            devices: as many as there are in the layout; None takes JAX's first ones, of all processes.
        Raises:
            ValueError: for fewer devices, or more where they are given.
        """
        found = jax.devices()[: self.devices] if devices is None else list(devices)
        if len(found) != self.devices:
            raise ValueError(f"Layout.mesh: {self} needs {self.devices} devices, got {len(found)}")
        return jax.make_mesh(self.sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=found)

    def check(self, config: ModelConfig, batch: int | None = None) -> None:
        """Refuse a model or batch that these devices cannot share evenly. Slots always can: the last page is padded.

        Raises:
            ValueError: naming the size that does not fit.
        """
        for name in ("kv_heads", "intermediate"):
            if getattr(config, name) % self.heads:
                raise ValueError(
                    f"Layout: `heads` must divide the model's {name}, {getattr(config, name)}, got {self.heads}"
                )
        if batch is not None and batch % self.data:
            raise ValueError(f"Layout: `data` must divide the batch, {batch} rows, got {self.data}")


def layout_of(mesh: Mesh) -> Layout:
    """The layout whose mesh this is."""
    return Layout(**{name: mesh.shape[name] for name in AXES})

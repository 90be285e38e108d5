"""The devices that a run trains on: a mesh over them, where arrays live, how far ahead of them the host runs."""

from jaxtransfer.devices.mesh import device_mesh
from jaxtransfer.devices.placement_table import placement_table
from jaxtransfer.devices.processes import first_does, start
from jaxtransfer.devices.sharding import fsdp

__all__ = ["device_mesh", "first_does", "fsdp", "placement_table", "start"]

"""The devices that a run trains on: a mesh over them, where arrays live, how far ahead of them the host runs."""

from jaxtransfer.devices.mesh import device_mesh as device_mesh

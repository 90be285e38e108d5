"""The devices that a run trains on."""

from jaxtransfer.devices.mesh import device_mesh as device_mesh

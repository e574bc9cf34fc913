"""Tensors on meshes: devices and layouts, processes, the operations that mesh-tensorflow lacks."""

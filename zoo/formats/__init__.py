"""Readers: a checkpoint on disk -> named tensors at byte offsets. One file per format."""

from zoo.formats.base import Checkpoint, TensorRef
from zoo.formats.opening import open_checkpoint

__all__ = ["Checkpoint", "TensorRef", "open_checkpoint"]

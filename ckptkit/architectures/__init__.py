"""Which known model has these names and shapes: `identify`, without torch.

Shipped indexes of torchvision's and timm's models (`ckptkit.architectures.index`) hold digests of names and
shapes, and the dimensions an argument decides, so that a model with another number of classes is found like the
original, and the number with it.  Where none fits, sketches tell the closest.

A hint, never proof: nothing in the tensors' values is looked at, and models that compute differently may have
the same names and shapes (``resnet18`` and ``quantized_resnet18`` before it is quantized).
"""

from __future__ import annotations

from ckptkit.architectures.match import Architecture, identify

__all__ = ["Architecture", "identify"]

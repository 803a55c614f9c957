"""mmfast: resolves conflicting gradients of multimodal models at the speed of memory."""

__version__ = "0.1.0"

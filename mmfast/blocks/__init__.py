"""The autograd layer: where gradients arrive apart, and are resolved on the way back."""

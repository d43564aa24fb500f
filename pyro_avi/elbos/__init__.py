"""Bounds and gradients beside Pyro's own, as ELBOs for ``fit`` and ``pyro.infer.SVI``, one a file."""

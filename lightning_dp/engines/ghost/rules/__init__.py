"""One file for each kind of layer: its rule, registered by a decorator of :mod:`lightning_dp.engines.ghost.registry`.

Importing this package imports every file in it, so that a new rule is a new file and no other line.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

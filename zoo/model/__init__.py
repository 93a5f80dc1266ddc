"""The reference implementation: a decoder built from a Spec, and its loader.

Read `decoder.py` first; each other module is one part of it, and its docstring lists what is unusual.
"""

from zoo.model.cache import Cache, Context
from zoo.model.decoder import Decoder
from zoo.model.load import load

__all__ = ["Cache", "Context", "Decoder", "load"]

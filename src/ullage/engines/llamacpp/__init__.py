"""The llama.cpp family: llama.cpp, ik_llama.cpp and ollama share one arithmetic of buffers.

Rooms: :mod:`settings` flags and defaults; :mod:`gguf_names`, :mod:`mixes`, :mod:`recipe` what the file holds;
:mod:`placement` which device holds it; :mod:`kv` the cache; :mod:`nodes`, :mod:`graph`, :mod:`latent_graph`,
:mod:`schedule`, :mod:`compute` the compute buffer; :mod:`start` puts them together, :mod:`log` in the engine's words.
"""

from ullage.engines.llamacpp.defaults import VERSIONS
from ullage.engines.llamacpp.start import start

__all__ = ["VERSIONS", "start"]

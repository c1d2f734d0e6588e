"""vLLM: its start arithmetic, from the launch line to the number of cache blocks, by version.

Rooms: :mod:`defaults` what a version does when nothing is said; :mod:`layout` which rank holds what; :mod:`loaded` the
weights as the engine keeps them; :mod:`profile` the activation peak of the profiling run; :mod:`graphs` and
:mod:`nontorch` what torch's allocator does not see; :mod:`specs`, :mod:`groups` and :mod:`pool` the KV cache;
:mod:`start` puts them together.
"""

from ullage.engines.vllm.defaults import VERSIONS
from ullage.engines.vllm.start import start

__all__ = ["VERSIONS", "start"]

"""What a machine really takes: idle, at full load, under changing load; for training steps and for served models.

The arithmetic (:mod:`~ullage.bench.loads`, :mod:`~ullage.bench.search`, :mod:`~ullage.bench.curves`) needs neither
torch nor a network; torch is imported in the process of one try alone, so that a failed try cannot spoil the next.
"""

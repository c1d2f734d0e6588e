"""Measuring on a GPU what is only modelled, and writing it down as a profile.

:mod:`~ullage.bench.calibrate.profile` is the arithmetic and needs no GPU; :mod:`~ullage.bench.calibrate.probes` runs on
one, each probe in a process of its own; :mod:`~ullage.bench.calibrate.cases` are the steps whose peaks are measured.
"""

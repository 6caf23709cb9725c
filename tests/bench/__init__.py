# SPDX-License-Identifier: GPL-2.0-or-later
"""The benchmark: what `make bench` measures, a module each, and how its table is made.

    figures.py  a measurement's values, the machine, the table
    kernel.py   our programs beside a floor, timed in the kernel
    probes.py   CPU time, memory
    peers.py    other flow exporters of the distribution

The rule: what is compared is measured in turn, in one run, in one unit; a figure is a median with the least and the
greatest value beside it, and its label says what is in it. No test ever depends on a figure.
"""

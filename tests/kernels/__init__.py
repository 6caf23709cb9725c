# SPDX-License-Identifier: GPL-2.0-or-later
"""The packet path on other kernels: each is booted under qemu, with this machine's root file system in it.

`make test-kernels` runs guest.py in all of KERNELS and prints the table.
"""

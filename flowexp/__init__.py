# SPDX-License-Identifier: GPL-2.0-or-later
"""flowexp: an IPFIX and NetFlow exporter whose flow table lives in the kernel."""

__version__ = "0.1.0"

# SPDX-License-Identifier: GPL-2.0-or-later
"""The laboratory: namespaces, traffic that is known to the octet, Collectors, the exporter under test.

Nothing here decides whether a test passes: it makes, measures and cleans up. It never imports flowexp.
"""

# SPDX-License-Identifier: GPL-2.0-or-later
"""What can go wrong, by who must act. The text of each is the one line that the operator reads."""

from __future__ import annotations


class FlowexpError(Exception):
    """Something failed at run time: exit status 1."""


class UsageError(FlowexpError):
    """The command line or the configuration is wrong: exit status 2."""

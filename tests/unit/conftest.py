# SPDX-License-Identifier: GPL-2.0-or-later
"""For the tests of TLS."""

from __future__ import annotations

import pytest
from lab import needs
from lab.certificates import Authority, Certificate


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA that nobody knows, for tests that ask nothing more of it."""
    needs.need(needs.tools("openssl"))
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def certificate(authority: Authority) -> Certificate:
    """A Collector's on this host, signed by `authority`."""
    return authority.sign("collector")

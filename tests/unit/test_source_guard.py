"""Which addresses are public."""

from __future__ import annotations

import pytest
from yarl import URL

from llorch_model.guard import Guard, PrivateAddress, is_public


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "::1",
        "fe80::1", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "ff02::1", "240.0.0.1",
    ],
)  # fmt: skip
def test_private_addresses_in_any_dress_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_ones_are(address: str) -> None:
    assert is_public(address)


def test_a_literal_address_is_refused_unless_its_host_is_trusted() -> None:
    guard = Guard(allow_private=False, trusted=["10.0.0.9"])

    guard.check(URL("https://10.0.0.9/x"))
    guard.check(URL("https://example.com/x"))
    with pytest.raises(PrivateAddress, match=r"10\.0\.0\.8 is not a public address, and LLORCH_ALLOW_PRIVATE_SOURCES is false"):
        guard.check(URL("https://10.0.0.8/x"))
    Guard(allow_private=True).check(URL("https://10.0.0.8/x"))

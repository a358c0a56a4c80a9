"""IP addresses that a webhook may be sent to: those that anybody reaches over the internet."""

from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
)
from typing import Final

Address = IPv4Address | IPv6Address

# Python's `is_global` differs between its releases, and is true for multicast, for 192.88.99.1, for
# 6to4 and for NAT64, whatever address these contain. So the rules are here, besides it.

_REFUSED_IPV4: Final = tuple(
    map(
        IPv4Network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
            *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24"),
            *("192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24"),
            *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
            "168.63.129.16/32",  # in each virtual machine of Azure its host, which has secrets
        ),
    )
)
"""IANA IPv4 Special-Purpose Address Registry (RFC 6890), and multicast (RFC 5771)."""

_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
_REFUSED_IPV6: Final = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # IETF protocol assignments, among them Teredo (RFC 4380)
            *("2001:db8::/32", "3fff::/20"),  # for documentation (RFC 3849, RFC 9637)
            "2002::/16",  # 6to4 (RFC 3056)
        ),
    )
)
_MAPPED: Final = IPv6Network("::ffff:0:0/96")
_NAT64: Final = IPv6Network("64:ff9b::/96")
"""What a name has in a network without IPv4 (RFC 6052): the last 32 bits are the IPv4 address."""

_IPV4_AT: Final = (
    (IPv6Network("::/96"), 96),  # IPv4-compatible (RFC 4291, 2.5.5.1)
    (_MAPPED, 96),
    (_NAT64, 96),
    (IPv6Network("64:ff9b:1::/48"), 96),  # NAT64 of a local prefix (RFC 8215)
    (IPv6Network("2002::/16"), 16),
)
"""Networks whose addresses contain an IPv4 address, and at which bit it begins."""
_TEREDO: Final = IPv6Network("2001::/32")

_METADATA: Final = (IPv4Network("169.254.0.0/16"), IPv6Network("fd00:ec2::/32"))
"""Where machines in a cloud read their credentials."""


def is_public(address: Address) -> bool:
    """Whether a webhook may be sent to the address: it is one of a single host, and anybody may
    reach it. An IPv6 address that stands for one of IPv4 is as that one."""
    if isinstance(address, IPv4Address):
        return address.is_global and not any(address in network for network in _REFUSED_IPV4)
    if address in _MAPPED or address in _NAT64:
        return is_public(_last_32_bits(address))
    return (
        address in _GLOBAL_UNICAST
        and address.is_global
        and not any(address in network for network in _REFUSED_IPV6)
    )


def is_metadata(address: Address) -> bool:
    """Whether a machine in a cloud reads its credentials at the address, or it contains such an
    address. No setting allows these."""
    return any(one in network for one in (address, *_contained(address)) for network in _METADATA)


def parse(text: str) -> Address | None:
    """The IP address of a text, IPv4 in dotted decimal form only, or IPv6 without a zone; None if
    it is none."""
    try:
        return None if "%" in text else ip_address(text)
    except ValueError:
        return None


def _contained(address: Address) -> tuple[IPv4Address, ...]:
    """The IPv4 addresses in an IPv6 address."""
    if isinstance(address, IPv4Address):
        return ()
    found = [
        IPv4Address((int(address) >> (96 - first_bit)) & 0xFFFFFFFF)
        for network, first_bit in _IPV4_AT
        if address in network
    ]
    if address in _TEREDO:
        found += [IPv4Address((int(address) >> 64) & 0xFFFFFFFF)]  # the server
        found += [IPv4Address(~int(address) & 0xFFFFFFFF)]  # the client, each bit inverted
    return tuple(found)


def _last_32_bits(address: IPv6Address) -> IPv4Address:
    return IPv4Address(int(address) & 0xFFFFFFFF)

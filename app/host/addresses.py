"""IP addresses as text in one canonical form, and what kind an address is."""

from ipaddress import IPv4Address, IPv6Address, ip_address

IpAddress = IPv4Address | IPv6Address


def parse(text: str) -> IpAddress | None:
    """An address from `10.0.0.1`, `[fd00::1]`, `fe80::1%eth0` or `::ffff:10.0.0.1` (which is IPv4); None for a name."""
    try:
        address = ip_address(text.strip().removeprefix("[").removesuffix("]").partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return address if mapped is None else mapped


def canonical(text: str) -> str:
    """The shortest form of an address; any other text as it is."""
    address = parse(text)
    return text.strip() if address is None else str(address)


def is_loopback(text: str) -> bool:
    address = parse(text)
    return address is not None and address.is_loopback


def is_link_local(text: str) -> bool:
    """fe80::/10 only: it names no machine without an interface. 169.254/16 is used on direct cables, and does."""
    address = parse(text)
    return isinstance(address, IPv6Address) and address.is_link_local


def names_no_machine(text: str) -> bool:
    """0.0.0.0 and its network, ::, multicast, broadcast and what is reserved: nobody's own address."""
    address = parse(text)
    if isinstance(address, IPv4Address) and (address.is_reserved or address.packed[0] == 0):
        return True
    return address is not None and (address.is_unspecified or address.is_multicast)


def family(text: str) -> int | None:
    """4 or 6; None for a name."""
    address = parse(text)
    return None if address is None else address.version

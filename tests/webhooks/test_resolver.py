"""Names are looked up in few threads, for a limited time, and one that hangs harms no other."""

import asyncio
import threading
from collections.abc import Sequence
from ipaddress import ip_address

import pytest

from asyncinfer.webhooks.resolver import NameNotResolved, Resolver
from tests.faults.harness import eventually


class Names:
    """A resolver's answers; names that begin with `hang` wait until `release` is set."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.asked: list[str] = []

    def __call__(self, name: str) -> Sequence[str]:
        self.asked.append(name)
        if name.startswith("hang"):
            self.release.wait(30)
        if name.startswith("absent"):
            raise OSError("no such name")
        return {"zone.example": ["8.8.8.8", "fe80::1%eth0"]}.get(name, ["8.8.8.8", "::1"])


async def test_all_addresses_of_a_name_are_found() -> None:
    resolver = Resolver(Names())
    assert await resolver.addresses_of("a.example") == (ip_address("8.8.8.8"), ip_address("::1"))
    assert await Resolver().addresses_of("10.0.0.1") == (ip_address("10.0.0.1"),)
    assert ip_address("127.0.0.1") in await Resolver().addresses_of("localhost")
    for name in ("absent.example", "zone.example"):
        with pytest.raises(NameNotResolved):
            await resolver.addresses_of(name)
    with pytest.raises(NameNotResolved):
        await Resolver().addresses_of("a..b")


async def test_names_that_hang_leave_threads_to_others() -> None:
    names = Names()
    resolver = Resolver(names, seconds=0.05)
    try:
        for _ in range(2):
            looked_up = [resolver.addresses_of(f"hang{number}.example") for number in range(11)]
            for task in [asyncio.ensure_future(each) for each in looked_up]:
                with pytest.raises(NameNotResolved, match="within"):
                    await task
        assert len(names.asked) == 11, "a name is not asked again while its look-up runs"
        assert await Resolver(names, seconds=5).addresses_of("a.example")
        assert await resolver.addresses_of("a.example")
    finally:
        names.release.set()


async def test_names_known_to_hang_share_few_threads() -> None:
    names = Names()
    resolver = Resolver(names, seconds=0.05)
    hanging = [f"hang{number}.example" for number in range(10)]
    await _all_fail(resolver, hanging)
    names.release.set()
    await eventually(lambda: not _threads(), "the look-ups have ended")
    assert await resolver.addresses_of("a.example"), "their ends were noted before this one's"

    names.asked.clear()
    names.release.clear()
    try:
        await _all_fail(resolver, hanging)
        assert len(names.asked) == 4
        assert await resolver.addresses_of("a.example")
    finally:
        names.release.set()


def _threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "webhook-resolver"]


async def _all_fail(resolver: Resolver, hosts: list[str]) -> None:
    results = await asyncio.gather(
        *(resolver.addresses_of(host) for host in hosts), return_exceptions=True
    )
    assert all(isinstance(result, NameNotResolved) for result in results)

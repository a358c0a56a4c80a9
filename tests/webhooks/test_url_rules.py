"""Which URLs and addresses a webhook may have: nobody reaches the operator's network by one."""

from ipaddress import ip_address

import pytest

from asyncinfer.errors import InvalidSetting, WebhookRefused
from asyncinfer.webhooks.addresses import is_metadata, is_public
from asyncinfer.webhooks.url_rules import Target, UrlRules

PUBLIC = (
    *("1.1.1.1", "8.8.8.8", "93.184.216.34", "223.255.255.254", "172.15.0.1", "172.32.0.1"),
    *("2606:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"),
)
NOT_PUBLIC = (
    # of this machine, of a network of one's own, of the link
    *("0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1"),
    *("172.31.255.255", "192.168.1.1", "169.254.169.254", "100.64.0.1", "100.100.100.200"),
    *("::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254", "fec0::1", "feff::1", "100::1"),
    # of many hosts
    *("224.0.0.1", "239.255.255.250", "255.255.255.255", "240.0.0.1", "ff02::1", "ff0e::1"),
    # for documentation, measurements, protocols, relays, and the host of a machine in Azure
    *("192.0.2.1", "198.51.100.1", "203.0.113.1", "198.18.0.1", "192.0.0.1", "192.0.0.192"),
    *("192.88.99.1", "192.52.193.1", "192.31.196.1", "192.175.48.1", "168.63.129.16"),
    *("2001:db8::1", "3fff::1", "2001:2::1", "2001:20::1", "5f00::1", "4000::1"),
    # IPv6 that stands for IPv4
    *("::127.0.0.1", "::8.8.8.8", "::ffff:10.0.0.1", "::ffff:127.0.0.1", "::ffff:224.0.0.1"),
    *("64:ff9b::10.0.0.1", "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b::e000:1"),
    *("64:ff9b:1::8.8.8.8", "64:ff9b:1::10.0.0.1", "::ffff:0:8.8.8.8"),
    *("2002:7f00:1::", "2002:a00:1::1", "2002:808:808::1", "2002:a9fe:a9fe::"),
    *("2001::1", "2001:0:808:808::f5ff:fffe", "2001:0:a9fe:a9fe::1"),
)


def test_only_addresses_that_anybody_reaches_are_public() -> None:
    assert [text for text in PUBLIC if not is_public(ip_address(text))] == []
    assert [text for text in NOT_PUBLIC if is_public(ip_address(text))] == []


def test_the_metadata_of_a_cloud_is_known_in_every_form() -> None:
    forms = (
        *("169.254.169.254", "169.254.0.1", "fd00:ec2::254", "::169.254.169.254"),
        *("::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe"),
        *("2002:a9fe:a9fe::1", "2001:0:a9fe:a9fe::1", "2001:0:808:808::5601:5601"),
    )
    assert [text for text in forms if not is_metadata(ip_address(text))] == []
    assert not is_metadata(ip_address("10.0.0.1"))
    assert not is_metadata(ip_address("fe80::1"))


@pytest.mark.parametrize("url", ["https://10.0.0.1/", "https://[::1]/", "https://[fd00::1]:8443/"])
def test_what_a_refusal_tells_the_operator_to_allow_is_then_allowed(url: str) -> None:
    with pytest.raises(WebhookRefused) as refused:
        UrlRules().check(url)
    receiver = refused.value.detail.split(" may add ")[1].split()[0]
    assert UrlRules([receiver]).check(url)


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("https://hooks.example.com", Target("https", "hooks.example.com", 443, "/")),
        (
            "HTTPS://Hooks.Example.com:8443/A/b?Token=1",
            Target("https", "hooks.example.com", 8443, "/A/b?Token=1"),
        ),
        ("https://xn--bcher-kva.example?x", Target("https", "xn--bcher-kva.example", 443, "/?x")),
        ("https://8.8.8.8/a", Target("https", "8.8.8.8", 443, "/a")),
        (
            "https://[2606:4700:0::1111]:443/",
            Target("https", "2606:4700::1111", 443, "/"),
        ),
    ],
)
def test_a_public_https_url_may_be_called(url: str, target: Target) -> None:
    assert UrlRules().check(url) == target


REFUSED = {
    # another scheme
    "http://hooks.example.com/": "use https",
    "ftp://hooks.example.com/": "it must be https",
    "file:///etc/passwd": "it must be https",
    "gopher://hooks.example.com/": "it must be https",
    "hooks.example.com": "it must be https",
    "": "is not ASCII",
    "//hooks.example.com/": "it must be https",
    # credentials, fragments, and what programs read in different ways
    "https://user:secret@hooks.example.com/": "user name",
    "https://hooks.example.com@127.0.0.1/": "user name",
    "https://hooks.example.com#@127.0.0.1/": "fragment",
    "https://hooks.example.com/#part": "fragment",
    "https://hooks.example.com\\@127.0.0.1/": "backslash",
    "https://hooks.example.com/a b": "a space",
    "https://hooks.example.com/\r\nHost: x": "a space",
    "https://hooks.example.com/\x00": "not ASCII",
    "https:// hooks.example.com/": "a space",
    "https:///path": "not a host name",
    "https://hooks..example.com/": "not a host name",
    "https://-hooks.example.com/": "not a host name",
    "https://hooks.example.com%2f/": "not a host name",
    f"https://{'a' * 64}.example.com/": "not a host name",
    f"https://{'a.' * 127}com/": "not a host name",
    f"https://hooks.example.com/{'a' * 2048}": "more than 2048",
    # ports
    "https://hooks.example.com:/": "port",
    "https://hooks.example.com:0/": "port",
    "https://hooks.example.com:65536/": "port",
    "https://hooks.example.com:+443/": "port",
    "https://hooks.example.com:443:443/": "must be https://host/path",
    # names of other alphabets, which some programs turn into digits and dots
    "https://bücher.example/": "not ASCII",
    "https://\uff11\uff12\uff17.\uff10.\uff10.\uff11/": "not ASCII",
    "https://127\u30020\u30020\u30021/": "not ASCII",
    "https://\u24dbocalhost/": "not ASCII",
    # addresses in other forms
    "https://2130706433/": "four decimal numbers",
    "https://017700000001/": "four decimal numbers",
    "https://0x7f000001/": "four decimal numbers",
    "https://0x7f.0.0.1/": "four decimal numbers",
    "https://0x7f.0.0.0x1/": "four decimal numbers",
    "https://0177.0.0.01/": "four decimal numbers",
    "https://127.1/": "four decimal numbers",
    "https://127.0.0.1.5/": "four decimal numbers",
    "https://256.1.1.1/": "four decimal numbers",
    "https://8.8.8.8./": "dot at the end",
    "https://127.0.0.1./": "dot at the end",
    "https://hooks.example.com./": "dot at the end",
    "https://localhost./": "dot at the end",
    "https://[fe80::1%25eth0]/": "without a zone",
    "https://[fe80::1%eth0]/": "without a zone",
    "https://[8.8.8.8]/": "IPv6 address",
    "https://[::1/": "must be https://host/path",
    "https://::1/": "must be https://host/path",
    # addresses and names inside
    "https://127.0.0.1/": "not public",
    "https://10.1.2.3:8443/": "not public",
    "https://100.64.0.1/": "not public",
    "https://192.88.99.1/": "not public",
    "https://224.0.0.1/": "not public",
    "https://169.254.169.254/latest/meta-data": "metadata",
    "https://[::1]/": "not public",
    "https://[::127.0.0.1]/": "not public",
    "https://[::ffff:10.0.0.1]/": "not public",
    "https://[::ffff:a00:1]/": "not public",
    "https://[fec0::1]/": "not public",
    "https://[ff02::1]/": "not public",
    "https://[64:ff9b::10.0.0.1]/": "not public",
    "https://[2002:7f00:1::]/": "not public",
    "https://[fd00:ec2::254]/": "metadata",
    "https://localhost/": "no public host name",
    "https://redis:6379/": "no public host name",
}


def test_a_url_that_may_lead_inside_is_refused_and_says_why() -> None:
    rules = UrlRules()
    wrong: list[tuple[str, object]] = []
    for url, reason in REFUSED.items():
        try:
            wrong.append((url, rules.check(url)))
        except WebhookRefused as error:
            if reason not in error.detail:
                wrong.append((url, error.detail))
    assert wrong == []


def test_an_allowed_receiver_may_have_http_and_any_address_at_its_port_alone() -> None:
    rules = UrlRules(["localhost:9000", "10.0.0.1:80", "[fd00::1]:443", "Hooks.example.com:443"])
    for url in (
        *("http://localhost:9000/a", "https://localhost:9000/a", "http://10.0.0.1/"),
        *("https://[fd00:0::1]/", "https://hooks.example.com/"),
    ):
        rules.check(url)
    rules.check_address("hooks.example.com", 443, ip_address("192.168.0.1"))
    for url in (
        *("http://localhost:9001/a", "https://localhost/", "https://10.0.0.1/"),
        *("http://hooks.example.com/", "https://10.0.0.2/"),
    ):
        with pytest.raises(WebhookRefused):
            rules.check(url)
    with pytest.raises(WebhookRefused, match=r"WEBHOOK_ALLOW"):
        rules.check_address("other.example.com", 443, ip_address("192.168.0.1"))


def test_no_setting_allows_the_metadata_of_a_cloud() -> None:
    rules = UrlRules(["169.254.169.254:80", "[fd00:ec2::254]:80", "inside.example:80"])
    for url in ("http://169.254.169.254/", "http://[fd00:ec2::254]/"):
        with pytest.raises(WebhookRefused, match="metadata"):
            rules.check(url)
    for address in ("169.254.169.254", "::ffff:169.254.169.254", "fd00:ec2::254"):
        with pytest.raises(WebhookRefused, match="metadata"):
            rules.check_address("inside.example", 80, ip_address(address))


@pytest.mark.parametrize(
    "entry", ["localhost", "https://localhost:1", "a b:1", "localhost:1/x", "localhost:0", "", "*"]
)
def test_a_wrong_entry_of_webhook_allow_is_refused_at_the_start(entry: str) -> None:
    with pytest.raises(InvalidSetting, match="WEBHOOK_ALLOW"):
        UrlRules([entry])

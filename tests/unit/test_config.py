# SPDX-License-Identifier: GPL-2.0-or-later
"""What a configuration may say, what it then means, and the one line an operator reads when it is wrong."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Iterator, Tuple

import pytest
import toml
from hypothesis import given, settings
from hypothesis import strategies as st

from flowexp import config_load
from flowexp.collector_url import CollectorUrl
from flowexp.config import MAX_COLLECTORS, Collector, Config, Timeouts, keys
from flowexp.config_load import find_place, load, read
from flowexp.errors import UsageError
from flowexp.rates import MAX_INTERVALS, Rates, domain_of

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "conf" / "flowexp.toml"
LOOPBACK = CollectorUrl("udp", "ipfix", "127.0.0.1", 4739, "")
URLS = "udp://HOST[:PORT], tcp://HOST[:PORT], tls://HOST[:PORT], file:///PATH"
A_COLLECTOR = '[[collector]]\nurl = "udp://127.0.0.1"\n'


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "flowexp.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


@pytest.fixture
def no_default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "etc" / "flowexp.toml"
    monkeypatch.setattr(config_load, "DEFAULT_PATH", path)
    return path


def message_of(path: Path, **options: Any) -> str:
    with pytest.raises(UsageError) as raised:
        load(path, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message


# The file that is shipped


def commented_keys(text: str) -> Iterator[Tuple[str, str, bool, str, str]]:
    """(header, name, whether it is commented out, value, comment above) of each key in a TOML file."""
    header, comment = "", []
    for line in text.splitlines():
        key = re.fullmatch(r"(# )?(\w+) = (.*)", line)
        if key:
            yield header, key[2], bool(key[1]), key[3], " ".join(comment)
        elif re.fullmatch(r"(# )?\[.*\]", line):
            header = line[2:] if line.startswith("# ") else line
        elif line.startswith("# "):
            comment.append(line[2:])
            continue
        comment = []


def test_the_shipped_file_holds_every_key_in_order_with_its_default_limits_and_meaning() -> None:
    found = list(commented_keys(SHIPPED.read_text()))
    assert [(header, name) for header, name, _, _, _ in found] == [(k.header, k.name) for k in keys()]
    for (header, name, is_out, value, comment), key in zip(found, keys()):
        where = f"{header} {name}"
        assert comment.startswith(f"{key.meaning} Allowed: {key.allowed}"), where
        assert is_out == (key.default is None or header == "[[template]]"), where
        if key.default not in (None, dataclasses.MISSING):
            in_file = toml.loads(f"x = {value}")["x"]
            assert (tuple(in_file) if isinstance(in_file, (list, dict)) else in_file) == key.default, where


def test_the_shipped_file_means_the_defaults_and_a_collector_on_this_host() -> None:
    assert load(SHIPPED) == Config(collectors=(Collector(url=LOOPBACK),))


def test_the_shipped_file_comments_out_class_timeouts_with_the_values_they_take_by_default() -> None:
    general = {"idle": Timeouts().idle, "active": Timeouts().active}
    found = commented_keys(SHIPPED.read_text())
    values = {(h, name): float(value) for h, name, _, value, _ in found if h.startswith("[timeouts.")}
    assert len(values) == 8
    assert all(value == general[name] for (_, name), value in values.items())


def test_the_demo_has_timeouts_of_one_second_and_a_table_of_its_own() -> None:
    demo = load(ROOT / "conf" / "demo.toml")
    assert (demo.timeouts.idle_ns["tcp"], demo.timeouts.active_ns["other"]) == (1_000_000_000, 1_000_000_000)
    assert demo.timeouts.linger_ns <= 1_000_000_000
    assert demo.table.pin_path != Config().table.pin_path


def test_there_are_as_many_collectors_and_sampling_intervals_as_the_control_map_has_room_for() -> None:
    text = (ROOT / "bpf" / "flow.h").read_text()
    for name, most in (("COLLECTORS", MAX_COLLECTORS), ("SAMPLING_RATES", MAX_INTERVALS)):
        found = re.search(rf"#define {name} (\d+)", text)
        assert found and int(found[1]) == most


# Templates

SHORT = '[[template]]\nname = "short"\nelements = ["sourceIPv4Address", "octetDeltaCount/4"]\n'


def test_a_template_is_found_by_its_name(write: Any) -> None:
    made = load(write(f'[export]\ntemplate = "short"\n{SHORT}{A_COLLECTOR}'))
    spec = made.template(made.export.template)
    assert (spec.name, [str(field) for field in spec.fields]) == ("short", ["sourceIPv4Address", "octetDeltaCount/4"])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            '[export]\ntemplate = "shot"\n' + SHORT,
            '[export] template: no [[template]] has the name "shot"; the nearest is "short"',
        ),
        (SHORT + SHORT, '[[template]] name: "short" is there twice'),
        (SHORT.replace("short", "default"), '[[template]] name: "default" is there twice'),
        (
            SHORT.replace("octetDeltaCount", "octetCount"),
            "[[template]] elements: octetCount is no Information Element; nearest to it: octetTotalCount",
        ),
        (SHORT.replace("/4", "/9"), "[[template]] elements: octetDeltaCount: length 9 is none of 1, 2"),
        (SHORT.replace("sourceIPv4Address", "bgpNextAdjacentAsNumber"), "bgpNextAdjacentAsNumber is not measured"),
        ('[[template]]\nname = "x"\nelements = []\n', "[[template]] elements: no element is named"),
        (
            '[export]\ntemplate = "x"\n[[template]]\nname = "x"\nelements = ["vlanId"]\n',
            '[[template]] "x" cannot go to udp://127.0.0.1:4739: IPv4 flows that are not tagged',
        ),
    ],
)
def test_what_is_wrong_with_a_template_is_named(write: Any, text: str, fault: str) -> None:
    assert fault in message_of(write(text + A_COLLECTOR))


def test_an_enterprise_element_is_refused_at_start_for_a_collector_of_netflow9(write: Any) -> None:
    text = '[export]\ntemplate = "short"\n' + SHORT.replace("octetDeltaCount/4", "otherClassOfServicePacketTotalCount")
    message = message_of(write(text + '[[collector]]\nurl = "udp://127.0.0.1?protocol=netflow9"\n'))
    assert "otherClassOfServicePacketTotalCount: NetFlow v9 has no enterprise-specific elements; IPFIX has" in message


# What values mean


def test_durations_are_nanoseconds_for_the_program(write: Any) -> None:
    text = "[timeouts]\nidle = 0.1\nactive = 2.5\nlinger = 0\nsweep_interval = 0.25\n"
    text += "[table]\nno_exporter = 0\n[export]\ntemplate_refresh = 30\n"
    loaded = load(write(text + A_COLLECTOR))
    assert loaded.timeouts.idle_ns["udp"] == 100_000_000
    assert loaded.timeouts.active_ns["udp"] == 2_500_000_000
    assert loaded.timeouts.linger_ns == 0
    assert loaded.timeouts.sweep_interval_ns == 250_000_000
    assert loaded.table.no_exporter_ns == 0
    assert loaded.export.template_refresh_ns == 30_000_000_000


def test_a_protocol_class_has_its_own_timeouts_and_the_general_ones_for_the_rest(write: Any) -> None:
    text = "[timeouts]\nidle = 20\n[timeouts.udp]\nidle = 5\n[timeouts.icmp]\nactive = 7\n"
    timeouts = load(write(text + A_COLLECTOR)).timeouts
    second = 1_000_000_000
    assert timeouts.idle_ns == {"tcp": 20 * second, "udp": 5 * second, "icmp": 20 * second, "other": 20 * second}
    assert timeouts.active_ns == {"tcp": 60 * second, "udp": 60 * second, "icmp": 7 * second, "other": 60 * second}


# What is wrong


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("directon = 1", '"directon" is not a key; the nearest is direction'),
        ("[timeouts]\nidel = 1", '[timeouts] "idel" is not a key; the nearest is idle'),
        ("[timeout]\nidle = 1", '"timeout" is not a key; the nearest is timeouts'),
        ("[timeouts.tpc]\nidle = 1", '[timeouts] "tpc" is not a key; the nearest is tcp'),
        ("[timeouts.tcp]\nlinger = 1", '[timeouts.tcp] "linger" is not a key; the nearest is [timeouts] linger'),
        ('[[collector]]\nurl = "udp://h"\nmtu = 0', '[[collector]] "mtu" is not a key; the nearest is [export] mtu'),
        ('"a\\nb" = 1', '"a\\nb" is not a key; the nearest is '),
        ("timeouts = 1", "timeouts: 1 is not a section; write [timeouts]"),
        (
            "[collector]\nurl = 'udp://h'",
            'collector: {"url": "udp://h"} is not a list of sections; write [[collector]]',
        ),
        ("collector = ['udp://h']", 'collector: "udp://h" is not a section; write [[collector]]'),
        ("[[collector]]", f"[[collector]] url: missing; allowed: {URLS}"),
        (
            "[[collector]]\nurl = 4739",
            f"[[collector]] url: 4739 is not a text; allowed: {URLS}",
        ),
        ("[[collector]]\nurl = 'udp://'", '[[collector]] url: "udp://": it names no host'),
        ("interfaces = 'eth0'", 'interfaces: "eth0" is not a list of names, globs or "default route"'),
        ("interfaces = []", 'interfaces: [] is not a list of names, globs or "default route"'),
        ("interfaces = ['']", 'interfaces: [""] is not a list of names, globs or "default route"'),
        ("interfaces = [1]", 'interfaces: [1] is not a list of names, globs or "default route"'),
        ("direction = 'all'", 'direction: "all" is not one of: "once", "ingress", "egress", "both"'),
        ("direction = []", 'direction: [] is not one of: "once", "ingress", "egress", "both"'),
        ("xdp_force = 1", "xdp_force: 1 is not one of: false, true"),
        (
            "[[collector]]\nurl = 'tls://h'\nca_file = 'ca.pem'",
            '[[collector]] ca_file: "ca.pem" is not "" (those that this system trusts) or an absolute path',
        ),
        ("[table]\nmax_flows = true", "[table] max_flows: true is not a whole number; allowed: 16 to 67108864 flows"),
        (
            "[table]\nmax_flows = 1e5",
            "[table] max_flows: 100000.0 is not a whole number; allowed: 16 to 67108864 flows",
        ),
        ("[table]\nmax_flows = 15", "[table] max_flows: 15 is out of range; allowed: 16 to 67108864 flows"),
        ("[table]\npin_path = 'x'", '[table] pin_path: "x" is not an absolute path'),
        (
            "[table]\nno_exporter = 9",
            "[table] no_exporter: 9 is out of range; allowed: 0 (never) or 10 to 86400 seconds",
        ),
        ("[timeouts]\nidle = -5", "[timeouts] idle: -5 is out of range; allowed: 0.1 to 86400 seconds"),
        ("[timeouts]\nidle = nan", "[timeouts] idle: NaN is out of range; allowed: 0.1 to 86400 seconds"),
        ("[timeouts]\nidle = inf", "[timeouts] idle: Infinity is out of range; allowed: 0.1 to 86400 seconds"),
        ("[timeouts]\nidle = true", "[timeouts] idle: true is not a number; allowed: 0.1 to 86400 seconds"),
        ("[timeouts]\nidle = '15s'", '[timeouts] idle: "15s" is not a number; allowed: 0.1 to 86400 seconds'),
        (
            "[timeouts]\nidle = 1979-05-27",
            '[timeouts] idle: "1979-05-27" is not a number; allowed: 0.1 to 86400 seconds',
        ),
        ("[export]\ntcp_control_bits_octets = true", "[export] tcp_control_bits_octets: true is not one of: 1, 2"),
        (
            "hook = 'xdp'\ndirection = 'egress'",
            'hook: "xdp" sees ingress only, and direction is "egress"; set hook = "tc"',
        ),
    ],
)
def test_a_wrong_key_or_value_is_named_with_file_and_limit(write: Any, text: str, message: str) -> None:
    path = write(text)
    assert message_of(path, collectors=["udp://127.0.0.1"]).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("section", "name", "least", "most"),
    [
        ("timeouts", "idle", 0.1, 86400),
        ("timeouts", "active", 0.1, 86400),
        ("timeouts", "linger", 0, 600),
        ("timeouts", "sweep_interval", 0.05, 60),
        ("timeouts.udp", "idle", 0.1, 86400),
        ("table", "max_flows", 16, 67108864),
        ("table", "no_exporter", 10, 86400),
        ("export", "observation_domain_id", 0, 0xFFFFFFFF),
        ("export", "template_refresh", 1, 86400),
        ("export", "mtu", 512, 65535),
        ("export", "source_port", 0, 65535),
        ("export", "mark", 0, 0xFFFFFFFF),
    ],
)
def test_limits_are_allowed_and_what_lies_beyond_is_not(
    write: Any, section: str, name: str, least: float, most: float
) -> None:
    step = 1 if isinstance(least, int) else 0.01
    for value in (least, most):
        load(write(f"[{section}]\n{name} = {value}\n{A_COLLECTOR}"))
    for value in (least - step, most + step):
        assert f"{name}: {value} is out of range" in message_of(write(f"[{section}]\n{name} = {value}\n{A_COLLECTOR}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("url = 'tcp://h'\nca_file = '/ca'", "ca_file: only tls:// can use it, not tcp://h:4739"),
        (
            "url = 'udp://h?protocol=netflow9'\nbiflow = true",
            "biflow: only IPFIX has elements of the reverse direction, not udp://h:2055?protocol=netflow9",
        ),
        (
            "url = 'udp://h?protocol=netflow9'\npsamp = true",
            "psamp: only IPFIX has PSAMP's elements, not udp://h:2055?protocol=netflow9",
        ),
        (
            "url = 'udp://h?protocol=netflow5'\nbiflow = true",
            "biflow: only IPFIX has elements of the reverse direction, not udp://h:2055?protocol=netflow5",
        ),
        ("url = 'udp://h'\nspool_path = '/s'", "spool_path: only tcp:// and tls:// can use it, not udp://h:4739"),
        ("url = 'file:///f'\nbacklog_rate = 1", "backlog_rate: only tcp:// and tls:// can use it, not file:///f"),
        ("url = 'udp://h'\nfile_size = 1", "file_size: only file:// can use it, not udp://h:4739"),
        ("url = 'tls://h'\nkey_file = '/k'", "key_file: there is no cert_file that it could belong to"),
    ],
)
def test_a_key_that_a_transport_has_no_use_for_is_told(write: Any, text: str, message: str) -> None:
    path = write(f"[[collector]]\n{text}\n")
    assert message_of(path) == f"{path}: [[collector]] {message}"


def test_two_collectors_cannot_share_a_spool(write: Any) -> None:
    one = "[[collector]]\nurl = 'tcp://h'\nspool_path = '/var/spool/flowexp'\n"
    expected = 'spool_path: "/var/spool/flowexp" is that of two Collectors; give each its own'
    assert message_of(write(2 * one)).endswith(expected)


def test_nine_collectors_are_too_many_and_eight_are_not(write: Any) -> None:
    assert len(load(write(A_COLLECTOR * 8)).collectors) == 8
    assert message_of(write(A_COLLECTOR * 9)).endswith("[[collector]]: 9 are too many; allowed: 1 to 8")


@pytest.mark.parametrize(
    ("text", "line", "shown"),
    [
        ("x", 1, '"x"'),
        ("\n\nidle = 15s", 3, '"idle = 15s"'),
        ("hook = 'tc'\nhook = 'tc'", 2, "\"hook = 'tc'\""),
        ("hook = 'tc'\n# said \"twice\nlog_level = \"info", 3, '"log_level = \\"info"'),
        ("[timeouts]\nidle = 1\n[timeouts]\nactive = 1", 3, '"[timeouts]"'),
        ("hook = 'tc'\ninterfaces = [\n  'eth0',\n  eth1,\n]\n", 2, '"interfaces = ["'),
        ("hook = 'tc'\n\nx = {y = 1\n", 3, '"x = {y = 1"'),  # toml: IndexError
        ("hook = 'tc'\n[[hook]]\n", 2, '"[[hook]]"'),  # toml: AttributeError
        ("hook = 'tc'\nx = " + "[" * 3000, 2, '"x = [[['),  # toml: RecursionError
        ('hook = "tc"\ninterfaces = ["eth0", "eth1"\n', 2, '"interfaces = [\\"eth0\\"'),  # toml takes it as "eth"
        ("interfaces = ['eth0',\n'eth1'\n[timeouts]\nidle = 1\n", 1, '"interfaces = ['),
        ('log_level = """\ninfo\nhook = \'tc\'\n', 1, '"log_level = '),
        ("hook = 'tc'\nx = 1\x00", 2, '"x = 1\\u0000"'),
    ],
)
def test_what_toml_cannot_read_is_one_line_with_file_and_line_number(
    write: Any, text: str, line: int, shown: str
) -> None:
    path = write(text)
    assert message_of(path).startswith(f"{path}:{line}: not TOML: {shown}")


def test_text_that_is_not_utf8_is_one_line_with_file_and_line_number(write: Any) -> None:
    path = write(b"# one\n# tw\xf6\n")
    assert message_of(path) == f"{path}:2: not UTF-8; a configuration is text in UTF-8"


def test_a_byte_order_mark_and_windows_line_ends_are_read(write: Any) -> None:
    assert load(write("\ufeffhook = 'tc'\r\n" + A_COLLECTOR.replace("\n", "\r\n"))).collectors[0].url == LOOPBACK


@settings(deadline=None)
@given(st.text(alphabet="ab[]{}=\".'#,\\-+_ \n\r\t019:TZefux\0é", max_size=60))
def test_any_text_is_a_configuration_or_a_usage_error_of_one_line(tmp_path_factory: Any, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(text.encode())
    try:
        read(path)
    except UsageError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_shipped_file_is_a_configuration_or_a_usage_error_of_one_line(
    tmp_path_factory: Any, data: st.DataObject
) -> None:
    text = re.sub(r"#.*\n", "", SHIPPED.read_text())
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 20)))
    path = tmp_path_factory.getbasetemp() / "damaged.toml"
    path.write_text(text[:start] + data.draw(st.text("[]{}=\"'#,.\n1x ", max_size=4)) + text[end:])
    try:
        read(path)
    except UsageError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)


# Where it comes from


def test_options_take_the_place_of_the_file(write: Any) -> None:
    path = write('interfaces = ["eth0"]\ndirection = "both"\n' + A_COLLECTOR)
    loaded = load(path, interfaces=["wg*", "eth1"], collectors=["udp://[::1]:1"], direction="egress", persist=True)
    assert loaded.interfaces == ("wg*", "eth1")
    assert loaded.direction == "egress"
    assert [str(each.url) for each in loaded.collectors] == ["udp://[::1]:1"]
    assert loaded.table.persist is True
    assert load(path).interfaces == ("eth0",) and load(path).table.persist is False


def test_an_option_that_is_wrong_is_named(write: Any) -> None:
    path = write(A_COLLECTOR)
    assert message_of(path, collectors=["udp://"]) == '--collector: "udp://": it names no host'
    assert message_of(path, direction="up").startswith('--direction: "up" is not one of: "once"')
    assert message_of(path, interfaces=[""]).startswith('-i: [""] is not a list of names')


def test_without_a_path_the_default_file_is_read_if_it_is_there(no_default_file: Path) -> None:
    no_default_file.parent.mkdir()
    no_default_file.write_text("log_level = 'debug'\n" + A_COLLECTOR)
    assert load(None).log_level == "debug"


def test_without_any_file_a_collector_suffices(no_default_file: Path) -> None:
    assert load(None, collectors=["udp://127.0.0.1"]) == Config(collectors=(Collector(url=LOOPBACK),))


def test_with_neither_file_nor_collector_both_are_named(no_default_file: Path) -> None:
    assert message_of(None) == f"there is no {no_default_file}; write it, or give -c FILE or --collector URL"


def test_a_file_that_names_no_collector_needs_the_option(write: Any) -> None:
    path = write("hook = 'tc'\n")
    assert message_of(path) == f"{path}: no [[collector]]; add one with its url, or give --collector URL"
    assert load(path, collectors=["udp://127.0.0.1"]).collectors[0].url == LOOPBACK


def test_a_file_that_is_asked_for_must_be_there_even_with_a_collector(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    assert message_of(path, collectors=["udp://127.0.0.1"]) == f"{path}: there is no such file"


def test_a_directory_or_a_file_below_a_file_is_one_line(tmp_path: Path, write: Any) -> None:
    assert message_of(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    below = write("") / "below"
    assert message_of(below) == f"{below}: cannot be read: Not a directory"


def test_field_groups_are_added_to_what_records_carry_by_default(write: Any) -> None:
    loaded = load(write(f'[fields]\ngroups = ["tcp", "sizes"]\n{A_COLLECTOR}'))
    assert loaded.fields.groups == ("sizes", "tcp")  # in flowexp's own order, whatever the file's
    names = [field.name for field in loaded.template("default").fields]
    assert "tcpHandshakeTimeMicroseconds" in names and "octetDeltaSumOfSquares" in names


def test_a_field_group_that_there_is_not_is_refused_with_those_that_there_are(write: Any) -> None:
    assert message_of(write(f'[fields]\ngroups = ["tpc"]\n{A_COLLECTOR}')).endswith(
        '[fields] groups: "tpc" is no field group; '
        'allowed: any of "sizes", "timing", "tcp", "congestion", "l2", "nat", "routing", '
        '"application", "tunnels", "drops", "integrity"'
    )


def test_an_element_of_a_group_that_is_off_is_refused_with_the_groups_name(write: Any) -> None:
    template = '[[template]]\nname = "own"\nelements = ["octetDeltaCount", "tcpMaximumSegmentSize"]\n'
    message = message_of(write(f'[export]\ntemplate = "own"\n{template}{A_COLLECTOR}'))
    assert message.endswith('[[template]] "own": tcpMaximumSegmentSize needs the group "tcp" in [fields] groups')


def test_records_have_as_numbers_where_there_is_a_file_of_them_for_routing(write: Any) -> None:
    elements = {"bgpSourceAsNumber", "bgpDestinationAsNumber"}
    for fields, expected in (
        ('groups = ["routing"]\nas_table = "/etc/as.tsv"', elements),
        ('groups = ["routing"]', set()),
        ('groups = ["nat"]\nas_table = "/etc/as.tsv"', set()),
    ):
        loaded = load(write(f"[fields]\n{fields}\n{A_COLLECTOR}"))
        assert elements & {field.name for field in loaded.template("default").fields} == expected
        assert loaded.fields.groups in (("routing",), ("nat",))


def test_an_as_number_in_a_template_needs_the_file(write: Any) -> None:
    template = '[[template]]\nname = "own"\nelements = ["bgpSourceAsNumber"]\n[export]\ntemplate = "own"\n'
    needed = 'bgpSourceAsNumber needs [fields] as_table, and the group "routing" in [fields] groups'
    assert message_of(write(f'{template}{A_COLLECTOR}[fields]\ngroups = ["routing"]\n')).endswith(needed)
    assert message_of(write(f'{template}{A_COLLECTOR}[fields]\nas_table = "/etc/as.tsv"\n')).endswith(needed)
    load(write(f'{template}{A_COLLECTOR}[fields]\ngroups = ["routing"]\nas_table = "/etc/as.tsv"\n'))


def test_a_sampling_interval_that_netflow5_cannot_tell_is_refused_with_the_collectors_name(write: Any) -> None:
    collector = "[[collector]]\nurl = 'udp://h?protocol=netflow5'\n"
    assert load(write(f"[sampling]\ninterval = 16383\n{collector}")).sampling.interval == 16383
    expected = "16384 cannot be told to udp://h:2055?protocol=netflow5: NetFlow v5 has room for up to 16383"
    assert message_of(write(f"[sampling]\ninterval = 16384\n{collector}")).endswith(expected)

    by_interface = f"[sampling]\nby_interface = {{ ppp0 = 16384 }}\n{collector}"
    assert message_of(write(by_interface)).endswith(expected)


def test_interfaces_have_sampling_intervals_by_their_names_and_the_first_that_fits_counts(write: Any) -> None:
    inline = load(write(f"[sampling]\nby_interface = {{ eth1 = 100, 'ppp*' = 5, 'default route' = 5 }}\n{A_COLLECTOR}"))
    assert inline.sampling.by_interface == (("eth1", 100), ("ppp*", 5), ("default route", 5))
    assert inline.sampling.rates == Rates((1, 5, 100), True)
    section = load(write(f"[sampling]\nmode = 'count'\n[sampling.by_interface]\n'e[12]' = 1\n{A_COLLECTOR}"))
    assert (section.sampling.by_interface, section.sampling.rates) == ((("e[12]", 1),), Rates())


@pytest.mark.parametrize(
    ("interfaces", "expected"),
    [
        ("['eth1']", '["eth1"] is not names, globs or "default route", each with 1 to 1000000 packets, as in {'),
        ("{ '' = 1 }", '{"": 1} is not names'),
        ("{ eth1 = 0 }", "by_interface eth1: 0 is out of range; allowed: 1 to 1000000 packets"),
        ("{ eth1 = 'all' }", 'by_interface eth1: "all" is not a whole number; allowed: 1 to 1000000 packets'),
    ],
)
def test_what_is_wrong_with_an_interfaces_interval_is_named(write: Any, interfaces: str, expected: str) -> None:
    message = message_of(write(f"[sampling]\nby_interface = {interfaces}\n{A_COLLECTOR}"))
    assert f"[sampling] {expected}" in message or f"[sampling] by_interface: {expected}" in message


def test_more_sampling_intervals_than_a_table_holds_are_refused(write: Any) -> None:
    def text(most: int) -> str:
        intervals = "".join(f"eth{each} = {each}\n" for each in range(2, most))
        return f"[sampling.by_interface]\n{intervals}{A_COLLECTOR}"

    assert len(load(write(text(9))).sampling.rates.intervals) == 8
    assert message_of(write(text(10))).endswith("[sampling]: 9 different intervals are too many; allowed: 1 to 8")


@pytest.mark.parametrize("query", ["", "?protocol=netflow5"])
def test_a_computed_observation_domain_that_another_collector_has_is_refused(write: Any, query: str) -> None:
    taken = domain_of(7, 100) + (0x50000 if query else 0)  # NetFlow v5 tells the last 16 bits
    collector = f"[[collector]]\nurl = 'udp://h{query}'\nobservation_domain_id = %d\n"
    text = "[sampling]\nby_interface = { eth1 = 100 }\n" + collector % 7 + collector % taken
    assert message_of(write(text)).endswith("is taken; set another observation_domain_id")
    assert load(write(text.replace(str(taken), str(taken + 1))))


@pytest.mark.parametrize("domain", [1, 7, 0xFFFFFFFF])
def test_no_two_intervals_have_the_same_observation_domain_nor_the_same_engine(domain: int) -> None:
    domains = {domain_of(domain, interval) for interval in range(0x10000)}
    assert len(domains) == len({each & 0xFFFF for each in domains}) == 0x10000
    assert domain_of(domain, 0) == domain
    assert len({domain_of(domain, interval) for interval in range(0, 1_000_001, 7)}) == len(range(0, 1_000_001, 7))


@pytest.mark.parametrize("group", ["timing", "tcp", "drops"])
def test_what_follows_a_flow_packet_by_packet_is_refused_with_sampling(write: Any, group: str) -> None:
    text = f"[sampling]\ninterval = 2\n[fields]\ngroups = ['{group}']\n{A_COLLECTOR}"
    expected = f'[fields] groups: "{group}" needs every packet; [sampling] interval is 2'
    assert message_of(write(text)).endswith(expected)


def test_what_has_no_reverse_element_is_refused_with_biflow_by_name(write: Any) -> None:
    message = message_of(write("[fields]\ngroups = ['sizes']\n[[collector]]\nurl = 'udp://h'\nbiflow = true\n"))
    assert '"default" cannot go to udp://h:4739: packetsUpTo64OctetsDeltaCount has no reverse element' in message


def test_where_an_exporter_is_can_be_read_in_a_file_that_is_wrong_elsewhere(write: Any) -> None:
    path = write(f"[table]\npin_path = '/sys/fs/bpf/other'\nmax_flow = 5\n{A_COLLECTOR}")
    config, trouble = find_place(path)
    assert config.table.pin_path == "/sys/fs/bpf/other"
    assert str(trouble).endswith('[table] "max_flow" is not a key; the nearest is max_flows')
    for text in ("[table\n", "[table]\npin_path = 7\n", "table = 5\n"):
        with pytest.raises(UsageError):
            find_place(write(text))
    assert find_place(write(A_COLLECTOR))[1] is None


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("max_flow = 5\n", "[table] max_flows"),
        ("max_flows = 5\n", "[table] max_flows"),
        ("[table]\nmax_flow = 5\n", "max_flows"),
        ("[timeouts]\nidel = 5\n", "idle"),
        ("[table]\nqqq = 5\n", "pin_path"),
    ],
)
def test_the_nearest_key_may_be_in_another_section(write: Any, text: str, nearest: str) -> None:
    assert message_of(write(text + A_COLLECTOR)).endswith(f"the nearest is {nearest}")


@pytest.mark.parametrize("address", ["5", "true", "['192.0.2.1']"])
def test_a_source_address_is_a_string(write: Any, address: str) -> None:
    assert "is no address; allowed:" in message_of(write(f"{A_COLLECTOR}source_address = {address}\n"))


def test_two_collectors_do_not_write_into_one_file(write: Any) -> None:
    text = "[[collector]]\nurl = 'file:///tmp/one.ipfix'\n"
    assert message_of(write(text * 2)).endswith("is that of two Collectors; give each its own")

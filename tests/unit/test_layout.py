# SPDX-License-Identifier: GPL-2.0-or-later
"""The layout that Python reads out of the object's BTF is the one a C compiler gives bpf/flow.h."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import pytest
from lab import needs

from flowexp.errors import FlowexpError
from flowexp.kernel.layout import Layout, read_layout
from flowexp.kernel.loader import load_layout, object_path

HEADER = Path(__file__).parents[2] / "bpf" / "flow.h"
STRUCTS = ("flow_hot4", "flow_hot6", "flow_cold", "flow_sizes", "flow_timing", "flow_tcp", "flow_congestion",
           "flow_integrity", "counters", "settings", "control")  # fmt: skip
# Every struct whose members are shared, by itself: its fields as (offset, octets).
Fields = Dict[str, Tuple[int, int]]


@pytest.fixture(scope="module")
def layout() -> Layout:
    needs.need(needs.bpf())
    return load_layout(object_path())


def header_enumerators() -> List[str]:
    """The names in the header's enums, in order."""
    code = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    bodies = re.findall(r"\benum \w+ \{(.*?)\}", code, flags=re.DOTALL)
    return [entry.split("=")[0].strip() for body in bodies for entry in body.split(",") if entry.strip()]


def fields_of(dtype: np.dtype[Any]) -> Fields:
    fields: Any = dtype.fields
    return {name: (offset, kind.itemsize) for name, (kind, offset, *_) in fields.items()}


def compiled(directory: Path, statements: List[str]) -> List[List[str]]:
    """What a C program that includes flow.h prints, a list of words a line."""
    source, program = directory / "layout.c", directory / "layout"
    body = "\n".join(statements)
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{HEADER}"\nint main(void)\n{{\n{body}\nreturn 0;\n}}\n'
    )
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", program, source], check=True)
    shown = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return [line.split() for line in shown.splitlines()]


@pytest.mark.parametrize("name", STRUCTS)
def test_every_member_lies_where_the_compiler_puts_it(name: str, layout: Layout, tmp_path: Path) -> None:
    needs.need(needs.tools("gcc"))
    dtype = layout.structs[name]
    shown = compiled(tmp_path, [
        f'printf("{member} %zu %zu\\n", offsetof(struct {name}, {member}), sizeof(((struct {name} *) 0)->{member}));'
        for member in dtype.names or ()
    ] + [f'printf("size %zu\\n", sizeof(struct {name}));'])  # fmt: skip
    *members, (_, size) = shown
    assert fields_of(dtype) == {member: (int(offset), int(octets)) for member, offset, octets in members}
    assert dtype.itemsize == int(size)


@pytest.mark.parametrize("name", STRUCTS)
def test_no_octet_of_a_struct_is_without_a_member(name: str, layout: Layout) -> None:
    at = 0
    for offset, octets in sorted(fields_of(layout.structs[name]).values()):
        assert offset == at
        at += octets
    assert at == layout.structs[name].itemsize


def test_every_enumerator_has_the_compilers_value(layout: Layout, tmp_path: Path) -> None:
    needs.need(needs.tools("gcc"))
    names = header_enumerators()
    shown = compiled(tmp_path, [f'printf("{name} %d\\n", (int) {name});' for name in names])
    assert len(names) > 20
    assert {name: int(value) for name, value in shown} == {name: layout.constants[name] for name in names}


def test_counters_are_named_in_their_order(layout: Layout) -> None:
    names = [name for name in header_enumerators() if name.startswith("COUNT_")]
    assert layout.counter_names() == [name[len("COUNT_") :].lower() for name in names]
    assert layout.counter_names()[0] == "seen"
    assert len(names) == layout.constants["COUNTERS"]


def test_counters_of_a_cpu_hold_packets_and_octets_of_each(layout: Layout) -> None:
    count = layout.structs["counters"]["count"]
    assert count.shape == (layout.constants["COUNTERS"],)
    assert count.base.names == ("packets", "octets")


def test_both_families_share_the_members_up_to_the_key(layout: Layout) -> None:
    hot4, hot6 = (fields_of(layout.structs[f"flow_hot{family}"]) for family in (4, 6))
    shared = [name for name in hot4 if hot4[name][0] < hot4["src_addr"][0]]
    assert {name: hot6[name] for name in shared} == {name: hot4[name] for name in shared}


def test_a_known_ipv4_flow_touches_one_cache_line(layout: Layout) -> None:
    assert layout.structs["flow_hot4"].itemsize == 64


def test_words_that_both_sides_write_are_aligned(layout: Layout) -> None:
    for name in ("flow_hot4", "flow_hot6"):
        fields = fields_of(layout.structs[name])
        for member in ("ctl", "packets", "octets", "last_ns"):
            assert (fields[member][0] % 8, fields[member][1]) == (0, 8)
        assert layout.structs[name].itemsize % 8 == 0


def test_the_digest_is_the_same_for_the_same_object(layout: Layout) -> None:
    assert load_layout(object_path()).digest == layout.digest


def test_btf_that_is_cut_off_is_an_error_of_one_line() -> None:
    with pytest.raises(FlowexpError, match="its .BTF section is cut off; build it again"):
        read_layout(b"\x9f\xeb\x01")


def test_btf_without_our_structs_is_an_error_that_names_the_first_one_missing() -> None:
    header = b"\x9f\xeb\x01\x00" + b"".join(n.to_bytes(4, "little") for n in (24, 0, 0, 0, 1))
    with pytest.raises(FlowexpError, match="struct flow_hot4 is not in its BTF"):
        read_layout(header + b"\0")

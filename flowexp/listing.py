# SPDX-License-Identifier: GPL-2.0-or-later
"""What `dump` shows of flows: which of them, in which order and format, and where.

Nothing is written before all that can be wrong with the flows' source has shown.
"""

from __future__ import annotations

import os
import sys
import time
from itertools import chain, islice
from typing import IO, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from .arrange import aggregate_spec, aggregated, first, in_order, only
from .errors import UsageError
from .forms import CsvForm, Form, JsonForm
from .identity import observation_domain_id
from .kernel.flows import Columns
from .kernel.layout import Array
from .output import Destination, discard, put
from .protocol.ipfix import MessageEncoder
from .protocol.record import columns_to_values
from .protocol.template import DEFAULT, Templates, TemplateSpec, build_templates, template_spec, with_groups
from .session import CollectorSession
from .transport.file import FileTransport
from .view import TableForm

_IPFIX = "ipfix"
_SECOND_NS = 1_000_000_000
_AT_ONCE = 16384  # flows that become text together: more of it would wait for memory longer than it takes to make
_TOTALS = template_spec("totals", (str(field).replace("DeltaCount", "TotalCount") for field in DEFAULT.fields))


class Shape(NamedTuple):
    """What becomes of the flows before they are shown."""

    aggregate: Optional[str] = None  # the keys to sum over, as --aggregate has them
    sort: Optional[str] = None  # by one of arrange.ORDERS
    limit: Optional[int] = None
    totals: bool = False  # what flows count since their birth, and those that owe no record, too
    names: bool = False  # of services and interfaces


class Listing:
    """Flows in the format `form`. of_here: their interfaces are this machine's, and may be named.

    UsageError for what cannot be asked together.
    """

    def __init__(self, form: str, shape: Shape, *, to_file: bool, of_here: bool) -> None:
        if form == _IPFIX and not to_file and sys.stdout.isatty():
            raise UsageError("--format ipfix is binary; name a file for it with -o FILE")
        if shape.names and form != "table":
            raise UsageError(f"--names is for --format table: {form} has numbers, which every program understands")
        self._form, self._shape, self._of_here = form, shape, of_here
        self._spec = None if shape.aggregate is None else aggregate_spec(shape.aggregate)

    def write(self, flows: Iterable[Columns], groups: Sequence[str], destination: Optional[Destination]) -> None:
        """groups: the field groups that these flows have. Without a destination: standard output."""
        spec = self._spec
        if spec is not None:
            flows = aggregated(flows, spec)
        else:
            are_named = self._form != "table"  # there totals are where counts since the last record else are
            spec = _TOTALS if self._shape.totals and are_named else with_groups(DEFAULT, groups)
        ordered = _Ordered.of(flows, self._shape)
        if self._form == _IPFIX:
            _write_ipfix(ordered.in_families(), destination, build_templates(spec))
        else:
            self._write_text(ordered, spec, destination)

    def _write_text(self, flows: _Ordered, spec: TemplateSpec, destination: Optional[Destination]) -> None:
        stream = sys.stdout if destination is None else destination.begin()
        form, templates = self._form_for(stream, spec), build_templates(spec, tcp_control_bits_octets=2)
        try:
            for text in chain([form.head], flows.text(templates, form)):
                put(text, stream, "standard output" if destination is None else str(destination.path))
        except BrokenPipeError:
            discard(stream)

    def _form_for(self, stream: IO[str], spec: TemplateSpec) -> Form:
        if self._form == "json":
            return JsonForm()
        elements = [name for template in build_templates(spec).all() for name in template.names]
        if self._form == "csv":
            return CsvForm(elements)
        names = self._shape.names
        shown = None if spec.name == DEFAULT.name else elements
        return TableForm(stream, services=names, interfaces=names and self._of_here, elements=shown)


class _Ordered(NamedTuple):
    """Flows, and the numbers of those that are shown, in their order; None: all as they come."""

    parts: Iterable[Columns]
    order: Optional[Array]

    @classmethod
    def of(cls, flows: Iterable[Columns], shape: Shape) -> _Ordered:
        """What is wrong with the flows' source shows here, before anything is written."""
        if shape.sort is not None:
            return cls(*in_order(flows, shape.sort, shape.limit))
        flows = iter(flows if shape.limit is None else first(flows, shape.limit))
        return cls(chain(list(islice(flows, 1)), flows), None)

    def in_families(self) -> Iterable[Columns]:
        """Them as Columns, so that only each address family is in order."""
        return self.parts if self.order is None else only(self.parts, self.order)[0]

    def text(self, templates: Templates, form: Form) -> Iterator[str]:
        """Their lines, _AT_ONCE flows in each; where they come as they come, as soon as they are there."""
        for parts, order in self._pieces():
            lines = list(chain.from_iterable(_lines(part, templates, form) for part in parts))
            yield "".join(lines if order is None else map(lines.__getitem__, order.tolist()))

    def _pieces(self) -> Iterator[Tuple[Sequence[Columns], Optional[Array]]]:
        if self.order is not None:
            for begin in range(0, len(self.order), _AT_ONCE):
                yield only(self.parts, self.order[begin : begin + _AT_ONCE])
            return
        for part in self.parts:
            for begin in range(0, len(part["packets"]), _AT_ONCE):
                yield [{name: column[begin : begin + _AT_ONCE] for name, column in part.items()}], None


def _lines(flows: Columns, templates: Templates, form: Form) -> List[str]:
    """Each flow's, in their order."""
    lines = [""] * len(flows["packets"])
    for values, places in columns_to_values(flows, templates):
        for place, line in zip(places, form.lines(values)):
            lines[place] = line
    return lines


def _write_ipfix(flows: Iterable[Columns], destination: Optional[Destination], templates: Templates) -> None:
    """An IPFIX File (RFC 5655). OSError: standard output is closed."""
    if destination is None:
        os.write(sys.stdout.fileno(), b"")  # what stands in for a closed one could be opened anew, and swallow all
        path = "/dev/stdout"
    else:
        destination.begin()
        path = str(destination.path)
    transport = FileTransport(path)
    transport.open()
    encoder = MessageEncoder(
        observation_domain_id=observation_domain_id(0),
        max_message_octets=transport.max_message_octets(),
        templates=templates,
    )
    session = CollectorSession(transport, encoder, refresh_ns=sys.maxsize, warn=lambda line: None)  # trouble is raised
    for part in flows:
        session.send(part, 0, -(-time.time_ns() // _SECOND_NS))
        if session.trouble is not None:
            raise session.trouble
    transport.close()

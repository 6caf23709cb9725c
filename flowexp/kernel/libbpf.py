# SPDX-License-Identifier: GPL-2.0-or-later
"""libbpf through ctypes: what the loader, the table and the attachments call, and no more.

libbpf 0.6 and later (its maps by name, bpf_map_create, bpf_link_create). Every call that
fails raises OSError with the kernel's errno; who called says what it means to an operator.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import os
from typing import Any, Dict, List, Optional

from ..errors import FlowexpError

ARRAY, HASH, PERCPU_HASH, LRU_HASH, RINGBUF = 2, 1, 5, 9, 27  # enum bpf_map_type
MMAPABLE = 1 << 10  # BPF_F_MMAPABLE
TCX_INGRESS, TCX_EGRESS, XDP = 46, 47, 37  # enum bpf_attach_type
SCHED_CLS = 3  # enum bpf_prog_type
_BTF_KIND_ENUM = 6


class _TestRunOpts(ctypes.Structure):
    """struct bpf_test_run_opts."""

    _fields_ = [
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_void_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_void_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    ]


class _MapCreateOpts(ctypes.Structure):
    """struct bpf_map_create_opts, up to map_flags."""

    _fields_ = [
        ("sz", ctypes.c_size_t),
        ("btf_fd", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("map_extra", ctypes.c_uint64),
        ("numa_node", ctypes.c_uint32),
        ("map_ifindex", ctypes.c_uint32),
    ]


class _BtfInfo(ctypes.Structure):
    """struct bpf_btf_info, up to btf_size."""

    _fields_ = [("btf", ctypes.c_uint64), ("btf_size", ctypes.c_uint32)]


class _LinkCreateOpts(ctypes.Structure):
    """struct bpf_link_create_opts, up to flags."""

    _fields_ = [("sz", ctypes.c_size_t), ("flags", ctypes.c_uint32)]


def _signatures(lib: ctypes.CDLL) -> None:
    pointer, text, integer, word = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint32
    size = ctypes.c_size_t
    for name, result, arguments in (
        ("libbpf_set_print", pointer, [pointer]),
        ("btf__parse", pointer, [text, pointer]),
        ("btf__raw_data", pointer, [pointer, ctypes.POINTER(word)]),
        ("btf__free", None, [pointer]),
        ("bpf_object__open_file", pointer, [text, pointer]),
        ("bpf_object__load", integer, [pointer]),
        ("bpf_object__close", None, [pointer]),
        ("bpf_object__next_map", pointer, [pointer, pointer]),
        ("bpf_object__next_program", pointer, [pointer, pointer]),
        ("bpf_map__name", text, [pointer]),
        ("bpf_map__reuse_fd", integer, [pointer, integer]),
        ("bpf_map__set_initial_value", integer, [pointer, pointer, size]),
        ("bpf_program__name", text, [pointer]),
        ("bpf_program__set_autoload", integer, [pointer, ctypes.c_bool]),
        ("bpf_program__fd", integer, [pointer]),
        ("bpf_map_create", integer, [integer, text, word, word, word, pointer]),
        ("bpf_map_update_elem", integer, [integer, pointer, pointer, ctypes.c_uint64]),
        ("bpf_map_delete_elem", integer, [integer, pointer]),
        ("bpf_prog_load", integer, [integer, text, text, pointer, size, pointer]),
        ("bpf_prog_query", integer, [integer, integer, word, pointer, pointer, pointer]),
        ("bpf_prog_get_fd_by_id", integer, [word]),
        ("libbpf_version_string", text, []),
        ("bpf_obj_pin", integer, [integer, text]),
        ("bpf_obj_get", integer, [text]),
        ("bpf_link_create", integer, [integer, integer, integer, pointer]),
        ("bpf_raw_tracepoint_open", integer, [text, integer]),
        ("btf__load_vmlinux_btf", pointer, []),
        ("btf__find_by_name_kind", integer, [pointer, text, word]),
        ("btf__type_by_id", pointer, [pointer, word]),
        ("btf__name_by_offset", text, [pointer, word]),
        ("bpf_link_update", integer, [integer, integer, pointer]),
        ("bpf_obj_get_info_by_fd", integer, [integer, pointer, pointer]),
        ("bpf_prog_test_run_opts", integer, [integer, pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments


_MESSAGE_OCTETS = 1 << 24  # the verifier's whole log is one message, and what it says last is the reason
_messages: List[str] = []  # what libbpf said since the last call of take_messages()


def _keep_message(level: int, form: bytes, arguments: int) -> int:
    if level < 2:  # LIBBPF_DEBUG
        text = ctypes.create_string_buffer(_MESSAGE_OCTETS)
        ctypes.CDLL(None).vsnprintf(text, ctypes.c_size_t(_MESSAGE_OCTETS), form, ctypes.c_void_p(arguments))
        _messages.append(text.value.decode(errors="replace").rstrip())
        del _messages[:-200]
    return 0


# A module's own name: libbpf calls it for as long as it is loaded.
_KEEP_MESSAGE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_keep_message)


def take_messages() -> List[str]:
    """What libbpf has said, verifier log included, since this was asked last."""
    said, _messages[:] = list(_messages), []
    return said


def _open() -> ctypes.CDLL:
    name = ctypes.util.find_library("bpf") or "libbpf.so.1"
    try:
        lib = ctypes.CDLL(name, use_errno=True)
        _signatures(lib)
    except (OSError, AttributeError) as error:
        raise FlowexpError(f"libbpf: {error}; install libbpf 0.6 or later (libbpf1, libbpf)") from error
    lib.libbpf_set_print(_KEEP_MESSAGE)
    return lib


_library: Optional[ctypes.CDLL] = None


def library() -> ctypes.CDLL:
    """libbpf, opened at first use; FlowexpError names the package where it is missing."""
    global _library
    if _library is None:
        _library = _open()
    return _library


def check(result: Optional[int]) -> int:
    """Turns libbpf's -1 with errno (and 1.x's negative errno) into OSError; a null pointer, too."""
    if result is None or result < 0:
        code = ctypes.get_errno() or (-result if result else errno.EINVAL)
        raise OSError(code, os.strerror(code))
    return result


def create_map(kind: int, name: str, *, key_octets: int, value_octets: int, entries: int, flags: int = 0) -> int:
    """A new map's descriptor."""
    opts = _MapCreateOpts(sz=ctypes.sizeof(_MapCreateOpts), map_flags=flags)
    create = library().bpf_map_create
    return check(create(kind, name.encode()[:15], key_octets, value_octets, entries, ctypes.byref(opts)))


def update(map_fd: int, key: int, value: int) -> None:
    """Writes one 32-bit value under a 32-bit key."""
    k, v = ctypes.c_uint32(key), ctypes.c_uint32(value)
    check(library().bpf_map_update_elem(map_fd, ctypes.byref(k), ctypes.byref(v), 0))


def update_on_each_cpu(map_fd: int, key: int, value: bytes, cpus: int) -> None:
    """Writes the same value (a multiple of eight octets) under a 32-bit key, for so many possible CPUs."""
    k = ctypes.c_uint32(key)
    check(library().bpf_map_update_elem(map_fd, ctypes.byref(k), value * cpus, 0))


def delete(map_fd: int, key: int) -> None:
    """Deletes a 32-bit key; one that is not there is no error."""
    k = ctypes.c_uint32(key)
    try:
        check(library().bpf_map_delete_elem(map_fd, ctypes.byref(k)))
    except FileNotFoundError:
        pass


def load_program(kind: int, code: bytes) -> int:
    """A program of bare instructions (struct bpf_insn, host byte order); its descriptor."""
    return check(library().bpf_prog_load(kind, b"probe", b"GPL", code, len(code) // 8, None))


def attached_programs(ifindex: int, attach_type: int) -> List[int]:
    """The ids of the programs at a TCX hook, in the order in which packets meet them; none on a kernel without TCX."""
    ids, count, flags = (ctypes.c_uint32 * 64)(), ctypes.c_uint32(64), ctypes.c_uint32()
    query = library().bpf_prog_query
    try:
        check(query(ifindex, attach_type, 0, ctypes.byref(flags), ctypes.byref(ids), ctypes.byref(count)))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise
        return []
    return list(ids[: count.value])


def program_name(program_id: int) -> str:
    """At most 15 characters, as the kernel keeps it; "" where it may not be asked (CAP_SYS_ADMIN)."""
    try:
        fd = check(library().bpf_prog_get_fd_by_id(program_id))
    except OSError:
        return ""
    info = ctypes.create_string_buffer(80)  # struct bpf_prog_info, up to its name
    size = ctypes.c_uint32(ctypes.sizeof(info))
    try:
        check(library().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size)))
    finally:
        os.close(fd)
    return info.raw[64:80].partition(b"\0")[0].decode(errors="replace")


def version() -> str:
    """As in 1.1."""
    return str(library().libbpf_version_string().decode()).lstrip("v")


def pin(fd: int, path: str) -> None:
    check(library().bpf_obj_pin(fd, path.encode()))


def get_pinned(path: str) -> int:
    return check(library().bpf_obj_get(path.encode()))


def create_link(program_fd: int, ifindex: int, attach_type: int, flags: int = 0) -> int:
    """A link's descriptor: the program runs at the hook until the last descriptor or pin of it is gone."""
    opts = _LinkCreateOpts(sz=ctypes.sizeof(_LinkCreateOpts), flags=flags)
    return check(library().bpf_link_create(program_fd, ifindex, attach_type, ctypes.byref(opts)))


def update_link(link_fd: int, program_fd: int) -> None:
    """Puts another program in the place of a link's, without a packet in between that meets none or both."""
    check(library().bpf_link_update(link_fd, program_fd, None))


def attach_tracing(program_fd: int) -> int:
    """Runs the program where its section says (tp_btf), until the descriptor that this returns is closed."""
    return check(library().bpf_raw_tracepoint_open(None, program_fd))


def kernel_enumerators(enum: str) -> Dict[int, str]:
    """Names by number of an enum of the running kernel; empty where its BTF does not have it."""
    lib = library()
    btf = lib.btf__load_vmlinux_btf()
    if not btf:
        return {}
    try:
        number = lib.btf__find_by_name_kind(btf, enum.encode(), _BTF_KIND_ENUM)
        if number < 0:
            return {}
        found = ctypes.cast(lib.btf__type_by_id(btf, number), ctypes.POINTER(ctypes.c_uint32))
        count = found[1] & 0xFFFF  # struct btf_type: name, info, size; then name and value of each
        pairs = ((found[3 + 2 * each], found[4 + 2 * each]) for each in range(count))
        return {value: lib.btf__name_by_offset(btf, name).decode() for name, value in pairs}
    finally:
        lib.btf__free(btf)


def link_ifindex(link_fd: int) -> int:
    """The device that a TCX or XDP link is attached to; 0 when that is gone."""
    info = (ctypes.c_uint32 * 16)()  # struct bpf_link_info: type, id, prog_id, padding, then of both kinds: ifindex
    octets = ctypes.c_uint32(ctypes.sizeof(info))
    check(library().bpf_obj_get_info_by_fd(link_fd, ctypes.byref(info), ctypes.byref(octets)))
    return int(info[4])


def btf_octets(btf_fd: int) -> bytes:
    """The BTF that the kernel holds behind a descriptor, as a .BTF section has it."""
    octets = 0
    while True:
        data = ctypes.create_string_buffer(octets)
        info = _BtfInfo(btf=ctypes.addressof(data), btf_size=octets)
        size = ctypes.c_uint32(ctypes.sizeof(info))
        check(library().bpf_obj_get_info_by_fd(btf_fd, ctypes.byref(info), ctypes.byref(size)))
        if info.btf_size <= octets:
            return data.raw[: info.btf_size]
        octets = info.btf_size


_FRAME_OCTETS = 4096  # the kernel takes no frame that a page does not hold


class TestRun:
    """BPF_PROG_TEST_RUN of one program, with a context that is written in place between runs.

    `context`: a writable buffer holding struct __sk_buff or xdp_md, which the kernel reads.
    """

    def __init__(self, program_fd: int, context: Any) -> None:
        self._fd = program_fd
        self._context = context  # kept alive: the kernel is given its address
        self._opts = _TestRunOpts(sz=ctypes.sizeof(_TestRunOpts), repeat=1)
        self._place = (ctypes.c_char * _FRAME_OCTETS)()
        self._frame = memoryview(self._place).cast("B")
        self._opts.data_in = ctypes.addressof(self._place)
        self._opts.ctx_in = ctypes.addressof(ctypes.c_char.from_buffer(context))
        self._opts.ctx_size_in = len(memoryview(context).cast("B"))
        self._by_reference = ctypes.byref(self._opts)
        self._call = library().bpf_prog_test_run_opts

    def run(self, frame: bytes, repeat: int = 1) -> int:
        """Runs the program on an Ethernet frame (network order) and returns its verdict; OSError if refused."""
        opts, octets = self._opts, len(frame)
        if octets > _FRAME_OCTETS:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))  # as the kernel says
        self._frame[:octets] = frame
        opts.data_size_in = octets
        opts.repeat = repeat
        opts.data_size_out = 0  # the last run's; the kernel takes it for a buffer's size
        result = self._call(self._fd, self._by_reference)
        if result < 0:
            check(result)
        return ctypes.c_int32(opts.retval).value

    @property
    def duration_ns(self) -> int:
        """Mean time of a repetition in the last run."""
        return int(self._opts.duration)

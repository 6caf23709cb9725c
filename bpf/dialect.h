/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * One source, two compilers: clang with libbpf (the prebuilt object) and BCC on
 * the target. All that differs between them is here, and nowhere else is there an
 * #ifdef. The rest of bpf/ keeps to what both understand: no subprograms, no
 * callbacks, no fetching atomics, no constant tables, helpers as function pointers.
 */
#ifndef FLOWEXP_DIALECT_H
#define FLOWEXP_DIALECT_H

#include <linux/bpf.h>
#include <linux/types.h>
#include "flow.h"

#ifdef FLOWEXP_BCC
/* BCC: maps are file descriptors and settings are macros, both given with -D. */
#define MAP(name) ((void *) bpf_pseudo_fd(1, FD_##name))
#define SETTING(name) SETTING_##name
#define TUNNELS 0 /* its stack has no room for one (bcc_loader.py refuses the group) */
#define DEFINE_MAP(name, map_type, key_type, value_type, entries, flags)
#define DEFINE_RING(name, octets)
#define ENTRY(section)
/* BCC puts the kernel's own headers before us; these names are taken there. */
#define ktime_get_ns flowexp_ktime_get_ns
#define ktime_get_coarse_ns flowexp_ktime_get_coarse_ns
#undef READ_ONCE
#undef WRITE_ONCE
#else
/* libbpf: the maps are made by the loader and put in place of these; settings are read-only data. */
#define MAP(name) ((void *) &name)
#define SETTING(name) (settings.name)
#define TUNNELS 1 /* opened of a packet */
#define DEFINE_MAP(map_name, map_type, key_type, value_type, entries, flags) \
	struct {                                                            \
		int (*type)[map_type];                                      \
		key_type *key;                                              \
		value_type *value;                                          \
		int (*max_entries)[entries];                                \
		int (*map_flags)[flags];                                    \
	} map_name __attribute__((section(".maps"), used))
#define DEFINE_RING(map_name, octets)                                       \
	struct {                                                            \
		int (*type)[BPF_MAP_TYPE_RINGBUF];                          \
		int (*max_entries)[octets];                                 \
	} map_name __attribute__((section(".maps"), used))
#define ENTRY(name) __attribute__((section(name), used))
const volatile struct settings settings = {};
char licence[] __attribute__((section("license"), used)) = "GPL";
#endif

#define GROUP_IS_ON(group) (SETTING(groups) & (group))

/* <linux/stddef.h> has a weaker one, and a function left out of line may take five arguments only. */
#undef __always_inline
#define __always_inline inline __attribute__((always_inline))

#define HELPER(result, name, id, ...) static result (*const name)(__VA_ARGS__) = (void *) id

HELPER(void *, map_lookup, BPF_FUNC_map_lookup_elem, void *map, const void *key);
HELPER(long, map_update, BPF_FUNC_map_update_elem, void *map, const void *key, const void *value, __u64 flags);
HELPER(long, map_delete, BPF_FUNC_map_delete_elem, void *map, const void *key);
HELPER(__u64, ktime_get_ns, BPF_FUNC_ktime_get_ns, void);
HELPER(__u64, ktime_get_coarse_ns, BPF_FUNC_ktime_get_coarse_ns, void);
HELPER(__u32, get_smp_processor_id, BPF_FUNC_get_smp_processor_id, void);
HELPER(__u32, get_prandom_u32, BPF_FUNC_get_prandom_u32, void);
HELPER(long, skb_load_bytes, BPF_FUNC_skb_load_bytes, const void *skb, __u32 offset, void *to, __u32 len);
HELPER(long, skb_store_bytes, BPF_FUNC_skb_store_bytes, void *skb, __u32 offset, const void *from, __u32 len, __u64 flags);
HELPER(long, skb_change_tail, BPF_FUNC_skb_change_tail, void *skb, __u32 len, __u64 flags);
HELPER(long, xdp_load_bytes, BPF_FUNC_xdp_load_bytes, const void *xdp, __u32 offset, void *to, __u32 len);
HELPER(void *, ringbuf_reserve, BPF_FUNC_ringbuf_reserve, void *ring, __u64 octets, __u64 flags);
HELPER(void, ringbuf_submit, BPF_FUNC_ringbuf_submit, void *record, __u64 flags);
HELPER(void, ringbuf_discard, BPF_FUNC_ringbuf_discard, void *record, __u64 flags);
HELPER(long, fib_lookup, BPF_FUNC_fib_lookup, void *ctx, struct bpf_fib_lookup *params, int size, __u32 flags);

/* An atomic add without its result: BPF `v1` has no other. Also a compiler barrier. */
#define atomic_add(where, n) ((void) __sync_fetch_and_add(where, n))
#define READ_ONCE(x) (*(volatile typeof(x) *) &(x))
#define WRITE_ONCE(x, v) (*(volatile typeof(x) *) &(x) = (v))

/*
 * The stress test's object: now and then a packet stops between looking at a slot and writing to it,
 * for long enough that a sweep comes in between. In every other object this is nothing.
 */
#ifdef FLOWEXP_STRESS
HELPER(long, repeat, BPF_FUNC_loop, __u32 times, void *step, void *context, __u64 flags);
static long stress_step(__u32 i, void *context) { return !context && i && ktime_get_ns() == 0; }
#define STRESS_DELAY() ((void) (get_prandom_u32() % 128 == 0 && repeat(get_prandom_u32() % 16384, stress_step, 0, 0)))
#else
#define STRESS_DELAY() ((void) 0)
#endif

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define be16(x) ((__u16) __builtin_bswap16(x))
#define be32(x) ((__u32) __builtin_bswap32(x))
/* Multiplies bits 0, 16, 32, 48 into bits 48-51, in the order in which the lanes lie in memory. */
#define GATHER_LANES 0x0001000200040008ull
/* Two values that lie one behind the other in memory, as one; and each of two (second32: where it lies). */
#define join32(first, second) ((__u64) (second) << 32 | (__u32) (first))
#define second32(both) ((__u64) (both) & 0xffffffff00000000ull)
#define join16(first, second) ((__u32) (second) << 16 | (__u16) (first))
#define join8(first, second) ((__u16) ((second) << 8 | (first)))
#define first16(both) ((__u16) (both))
#define second16(both) ((__u16) ((both) >> 16))
#else
#define be16(x) ((__u16) (x))
#define be32(x) ((__u32) (x))
#define GATHER_LANES 0x0008000400020001ull
#define join32(first, second) ((__u64) (first) << 32 | (__u32) (second))
#define second32(both) ((__u64) (__u32) (both))
#define join16(first, second) ((__u32) (first) << 16 | (__u16) (second))
#define join8(first, second) ((__u16) ((first) << 8 | (second)))
#define first16(both) ((__u16) ((both) >> 16))
#define second16(both) ((__u16) (both))
#endif

#endif

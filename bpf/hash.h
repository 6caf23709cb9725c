/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The keyed hash of flows and tunnels, a word at a time. */
#ifndef FLOWEXP_HASH_H
#define FLOWEXP_HASH_H

#include "dialect.h"

/*
 * A multilinear hash with half the multiplications (Lemire and Kaser, "Strongly universal string
 * hashing is fast"): the upper 32 bits of the sum are strongly universal. Who does not know the
 * secret cannot make keys collide more often than by chance; a mixing hash with a seed has
 * collisions that hold for every seed.
 */
#define HASH(word, n) \
	(((__u64) (__u32) (word) + SETTING(secret[2 * (n)])) * (((word) >> 32) + SETTING(secret[2 * (n) + 1])))

#endif

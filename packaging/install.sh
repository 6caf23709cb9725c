#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# What every package holds beside the Python code, put under the folder ROOT:
#   install.sh ROOT UNIT_FOLDER ZSH_FOLDER
# PYTHONPATH, where it is needed, finds click and toml. What is made on the way goes into build/documents.
set -eu
cd "$(dirname "$0")/.."
root=$1 units=$2 zsh=$3
made=build/documents

/usr/bin/python3 -B packaging/documents.py "$made"
install -d "$root/etc/flowexp"
# A service that is restarted must not lose what it has metered.
sed 's/^persist = false$/persist = true/' conf/flowexp.toml >"$root/etc/flowexp/flowexp.toml"
grep -q '^persist = true$' "$root/etc/flowexp/flowexp.toml"
install -D -m 644 packaging/flowexp.service "$root$units/flowexp.service"
install -D -m 644 packaging/flowexp.sysusers "$root/usr/lib/sysusers.d/flowexp.conf"
install -D -m 644 "$made/flowexp.1" "$root/usr/share/man/man1/flowexp.1"
install -D -m 644 "$made/flowexp.toml.5" "$root/usr/share/man/man5/flowexp.toml.5"
install -D -m 644 "$made/flowexp.bash" "$root/usr/share/bash-completion/completions/flowexp"
install -D -m 644 "$made/flowexp.zsh" "$root$zsh/_flowexp"
install -D -m 644 "$made/flowexp.fish" "$root/usr/share/fish/vendor_completions.d/flowexp.fish"

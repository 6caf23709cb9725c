#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Installs what is missing, and says nothing where nothing is:
#   bootstrap.sh packages PACKAGE...   Debian packages: no questions, no recommends, no service started
#   bootstrap.sh kernel_headers        for BCC, where the running kernel has none: those of the newest one that has
#   bootstrap.sh python EXTRAS         flowexp itself with its extras ("" for none), in .venv
set -eu
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" # dpkg insists
policy=/usr/sbin/policy-rc.d
log=$(mktemp)
trap 'rm -f "$log"' EXIT
trap 'exit 1' HUP INT TERM

# Shows a command's output only if it fails.
quietly() {
	"$@" >"$log" 2>&1 </dev/null || {
		cat "$log" >&2
		return 1
	}
}

missing() {
	for package; do
		case $(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null) in
		installed) ;;
		*) printf '%s ' "$package" ;;
		esac
	done
}

apt_get() {
	LC_ALL=C DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get --yes --no-install-recommends \
		-o DPkg::Lock::Timeout=600 -o Dpkg::Options::=--force-confold "$@"
}

# The lock of the package lists has no timeout of its own. A list that cannot be had is left to the installation.
update_lists() {
	tries=120
	until apt_get update >"$log" 2>&1 </dev/null; do
		grep -q 'Could not get lock' "$log" && [ "$tries" -gt 0 ] || return 0
		tries=$((tries - 1))
		sleep 5
	done
}

# Until this script ends no package starts a service: nfdump's would take port 2055.
hold_services() {
	exec 9</usr/sbin
	flock 9
	trap 'release_services; rm -f "$log"' EXIT
	if grep -qs 'for flowexp' "$policy"; then # from a run that was killed
		rm "$policy"
	elif [ -e "$policy" ]; then
		mv "$policy" "$policy.before-flowexp"
	fi
	printf '#!/bin/sh\n# for flowexp: packages are being installed\nexit 101\n' >"$policy"
	chmod 755 "$policy"
}

release_services() {
	rm -f "$policy"
	[ ! -e "$policy.before-flowexp" ] || mv "$policy.before-flowexp" "$policy"
}

packages() {
	if ! command -v apt-get >/dev/null; then
		command -v clang >/dev/null && return
		echo "no apt-get here: install what your distribution has for: $*" >&2
		exit 1
	fi
	wanted=$(missing "$@")
	[ -n "$wanted" ] || return 0
	if [ "$(id -u)" -ne 0 ]; then
		echo "not root: first run 'apt-get install --no-install-recommends $wanted'" >&2
		exit 1
	fi
	echo "Installing $wanted"
	hold_services
	# shellcheck disable=SC2086
	apt_get install $wanted >"$log" 2>&1 </dev/null || { # no lists yet, or stale ones
		update_lists
		quietly apt_get install $wanted
	}
}

# Any release does: the packet path uses the kernel's public headers only.
kernel_headers() {
	here=/lib/modules/$(uname -r)
	[ ! -e "$here/build" ] && [ "$(id -u)" -eq 0 ] || return 0
	newest=$(find /lib/modules -mindepth 2 -maxdepth 2 -name build -exec test -d '{}/' ';' -print 2>/dev/null |
		sort -V | tail -n 1)
	[ -n "$newest" ] || return 0
	echo "Linking ${newest%/build}/{build,source} to $here"
	mkdir -p "$here"
	for name in build source; do
		[ ! -d "${newest%/*}/$name/" ] || ln -sfn "$(readlink -f "${newest%/*}/$name")" "$here/$name"
	done
}

python() {
	echo "Installing flowexp in .venv"
	[ -x .venv/bin/pip ] || quietly /usr/bin/python3 -m venv --clear --system-site-packages .venv
	quietly .venv/bin/python -m pip install --editable ".${1:+[$1]}"
	quietly .venv/bin/python -m compileall -q flowexp # a third of a start, where Python is told to write no bytecode
}

"$@"

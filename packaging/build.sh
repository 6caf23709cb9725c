#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Builds packages of the tree as it stands (what git ignores left out), all of it under build/:
#   build.sh dist    build/flowexp-VERSION.tar.gz
#   build.sh deb     build/flowexp_VERSION-1_ARCHITECTURE.deb
#   build.sh rpm     build/flowexp-VERSION-1.ARCHITECTURE.rpm
#   build.sh wheel   build/flowexp-VERSION-py3-none-any.whl, its BPF object for machines of this byte order
# MAINTAINER, as in "Name <name@example.org>", is who answers for the package; else whoever made the last commit.
set -eu
cd "$(dirname "$0")/.."
umask 022
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' flowexp/__init__.py)
maintainer=${MAINTAINER:-$(git log -1 --format='%an <%ae>')}
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
build=$PWD/build
tarball=$build/flowexp-$version.tar.gz

# Shows a command's output only if it fails.
quietly() {
	"$@" >"$build/log" 2>&1 </dev/null || {
		tail -n 50 "$build/log" >&2
		echo "packaging: $1 failed; all it said is in $build/log" >&2
		exit 1
	}
}

# Whole at any time: several packages may be built at once.
dist() {
	mkdir -p "$build"
	git ls-files --cached --others --exclude-standard -z | # files that are gone are still among those
		tar --create --gzip --file "$tarball.$$" --null --files-from=- --ignore-failed-read --warning=no-failed-read \
			--sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" \
			--transform "s,^,flowexp-$version/,"
	mv "$tarball.$$" "$tarball"
}

deb() {
	dist
	rm -rf "$build/deb"
	mkdir -p "$build/deb"
	tar --extract --file "$tarball" --directory "$build/deb"
	cd "$build/deb/flowexp-$version"
	mv packaging/debian debian
	sed -i "s/@MAINTAINER@/$maintainer/" debian/control
	{
		printf 'flowexp (%s-1) unstable; urgency=medium\n\n' "$version"
		printf '  * What is new is told in changelog.gz.\n\n'
		printf ' -- %s  %s\n' "$maintainer" "$(date --utc --rfc-email --date "@$SOURCE_DATE_EPOCH")"
	} >debian/changelog
	PATH=/usr/sbin:/usr/bin:/sbin:/bin quietly dpkg-buildpackage --build=binary --no-sign
	cp ../flowexp_*.deb "$build"
}

rpm() {
	dist
	rm -rf "$build/rpm"
	mkdir -p "$build/rpm/SOURCES"
	cp "$tarball" "$build/rpm/SOURCES"
	quietly .venv/bin/python -m pip download --no-deps --require-hashes --only-binary :all: \
		--dest "$build/rpm/SOURCES" --requirement packaging/rpm/vendored.txt
	sed "s/@VERSION@/$version/; s/@MAINTAINER@/$maintainer/
		s/@DATE@/$(LC_ALL=C date --utc --date "@$SOURCE_DATE_EPOCH" '+%a %b %d %Y')/" \
		packaging/rpm/flowexp.spec >"$build/rpm/flowexp.spec"
	# Debian's rpm knows of no build requirement.
	quietly rpmbuild -bb --nodeps --define "_topdir $build/rpm" --define "packager $maintainer" \
		"$build/rpm/flowexp.spec"
	cp "$build"/rpm/RPMS/*/flowexp-*.rpm "$build"
}

wheel() {
	dist
	rm -rf "$build/wheel"
	mkdir -p "$build/wheel"
	tar --extract --file "$tarball" --directory "$build/wheel"
	cp --recursive --dereference flowexp/data "$build/wheel/flowexp-$version/flowexp"
	quietly .venv/bin/python -m pip wheel --no-deps --wheel-dir "$build" "$build/wheel/flowexp-$version"
}

"$1"

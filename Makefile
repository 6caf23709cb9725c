# SPDX-License-Identifier: GPL-2.0-or-later
# make build                   .venv/bin/flowexp, ready to run
# make run [DURATION=seconds]  records of this machine's traffic, until Ctrl-C
# make test, make lint         what a commit must pass
# make test-kernels            the packet path on other kernels, under qemu: a table, into packaging/README.md
# make matrix                  which Collectors read what, into packaging/docs/collectors.md
# make soak [DURATION=seconds] an hour, or so long, of 100,000 packets a second, of kills, and an outage of a Collector
# make bench [BENCH=options]   flowexp beside its peers, into build/bench.json
# make bench-page              the tables of that in packaging/docs/speed.md, and the picture
# make sizing                  what sizes of the table cost, into packaging/README.md
# make picture                 the picture of `flowexp top` in README.md, packaging/top.svg
# Each installs what it lacks, and is quiet where nothing is to be done.

BUILD_PACKAGES = clang iproute2 iputils-ping libbpf1 libc6-dev linux-libc-dev python3-venv
KERNEL_TEST_PACKAGES = busybox-static kmod qemu-system-x86
BENCH_PACKAGES = fprobe nfdump pmacct softflowd tcpreplay tshark
TEST_PACKAGES = conntrack ethtool iperf3 linux-headers-$(shell dpkg --print-architecture 2>/dev/null) nfdump nftables pmacct \
	prometheus python3-bpfcc softflowd spin tcpreplay tmux tshark

WORKERS = 2 # processes of the tests, which wait more than they work

DATA = flowexp/data
OBJECTS = $(DATA)/flowexp.bpf.o $(DATA)/drops.bpf.o
SOURCE_FOR_BCC = flowexp/data/bpf
PYTHON = .venv/bin/python
INSTALLED = .venv/.flowexp
INSTALLED_FOR_TESTS = .venv/.flowexp-test
INSTALLED_FOR_PLOT = .venv/.flowexp-plot

CLANG = clang
BPF_FLAGS = -O2 -g -target bpf -mcpu=v3 -Wall -Wextra -Werror -I/usr/include/$(shell gcc -print-multiarch)

.PHONY: build run test test-kernels lint matrix soak bench bench-page sizing picture clean packages test-packages
.DELETE_ON_ERROR:

build: $(OBJECTS) $(SOURCE_FOR_BCC) $(INSTALLED)

run: build
	@exec $(PYTHON) packaging/demo.py $(DURATION)

test: build lint test-packages
	@$(PYTHON) -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder

lint: build $(INSTALLED_FOR_TESTS)
	@$(PYTHON) -m ruff check --quiet
	@$(PYTHON) -m mypy --no-error-summary

test-kernels: build $(INSTALLED_FOR_TESTS)
	@packaging/bootstrap.sh packages $(KERNEL_TEST_PACKAGES)
	@cd tests && exec ../$(PYTHON) -m kernels $(KERNELS)

matrix: build $(INSTALLED_FOR_TESTS)
	@WRITE_MATRIX=1 $(PYTHON) -m pytest -q tests/interop/test_matrix.py

soak: SECONDS = $(or $(DURATION),3600)
soak: build $(INSTALLED_FOR_TESTS) test-packages
	@FLOWEXP_SOAK_SECONDS=$(SECONDS) FLOWEXP_OUTAGE_SECONDS=120 \
		FLOWEXP_KILLS=$$(($(SECONDS) / 18 + 1)) FLOWEXP_KILL_PACKETS=$$(($(SECONDS) * 14000)) \
		$(PYTHON) -m pytest -q -s tests/soak.py tests/kernel/test_kill.py \
		tests/kernel/test_outage.py tests/interop/test_return.py

bench: build $(INSTALLED_FOR_TESTS)
	@packaging/bootstrap.sh packages $(BENCH_PACKAGES)
	@cd tests && exec ../$(PYTHON) -m bench $(BENCH)

bench-page: build $(INSTALLED_FOR_TESTS) $(INSTALLED_FOR_PLOT)
	@cd tests && exec ../$(PYTHON) -m bench --page

picture: build $(INSTALLED_FOR_TESTS)
	@cd tests && exec ../$(PYTHON) picture.py

sizing: build $(INSTALLED_FOR_TESTS)
	@cd tests && exec ../$(PYTHON) -m bench.sizing

clean:
	rm -rf .venv build flowexp/data *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find flowexp packaging tests -name __pycache__ -prune -exec rm -rf {} +

packages:
	@packaging/bootstrap.sh packages $(BUILD_PACKAGES)

test-packages: packages
	@packaging/bootstrap.sh packages $(TEST_PACKAGES) $(KERNEL_TEST_PACKAGES)
	@packaging/bootstrap.sh kernel_headers

$(OBJECTS): $(DATA)/%.o: $(wildcard bpf/*.[ch]) Makefile | packages
	@echo "Compiling $@"
	@mkdir -p $(@D)
	@$(CLANG) $(BPF_FLAGS) $(BPF_DEFINES) -c bpf/$*.c -o $@

$(SOURCE_FOR_BCC):
	@mkdir -p $(@D)
	@ln -s ../../bpf $@

$(INSTALLED): pyproject.toml packaging/bootstrap.sh | packages
	@packaging/bootstrap.sh python ""
	@touch $@

$(INSTALLED_FOR_TESTS): pyproject.toml packaging/bootstrap.sh | $(INSTALLED)
	@packaging/bootstrap.sh python test
	@touch $@

$(INSTALLED_FOR_PLOT): pyproject.toml packaging/bootstrap.sh | $(INSTALLED_FOR_TESTS)
	@packaging/bootstrap.sh python plot
	@touch $@

# Packages of the tree as it stands, under build/.
DEB_PACKAGES = debhelper dh-python pybuild-plugin-pyproject python3-all python3-click python3-numpy python3-setuptools python3-toml
RPM_PACKAGES = rpm
PACKAGE_TEST_PACKAGES = $(DEB_PACKAGES) $(RPM_PACKAGES) debootstrap lintian mandoc rpmlint systemd

.PHONY: dist deb rpm wheel package-sizes package-test-packages

dist:
	@packaging/build.sh dist

deb: packages
	@packaging/bootstrap.sh packages $(DEB_PACKAGES)
	@packaging/build.sh deb

rpm: $(INSTALLED)
	@packaging/bootstrap.sh packages $(RPM_PACKAGES)
	@packaging/build.sh rpm

wheel: build
	@packaging/build.sh wheel

package-sizes: $(INSTALLED_FOR_TESTS) package-test-packages
	@PYTHONPATH=tests $(PYTHON) tests/packages/sizes.py

test-packages: package-test-packages

package-test-packages: packages
	@packaging/bootstrap.sh packages $(PACKAGE_TEST_PACKAGES)

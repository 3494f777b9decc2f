#!/usr/bin/env bash
# Installs the Debian or Ubuntu packages that `make demo` and `make test` need. It does
# nothing, and needs no root and no network, where they are all there.
set -euo pipefail

packages=(
  qemu-system-x86 qemu-utils # VMs, and qemu-img
  mmdebstrap e2fsprogs zstd  # guest images from a package mirror
  debian-archive-keyring     # signs the mirror; ubuntu hosts lack it
  xfsprogs                   # a file system that can clone
  iptables                   # another firewall, which doctor has to find
  nftables iproute2 iputils-ping
  openssh-client
  procps util-linux fdisk xz-utils cpio strace
  systemd # the tests have its own tools read the units that are written; it need not be running
)

missing=()
for p in "${packages[@]}"; do
  dpkg-query -W -f '${db:Status-Status}\n' "$p" 2>/dev/null | grep -qx installed || missing+=("$p")
done

# Debian 12's QEMU 7.2 crashes kernels from 6.12 on under emulation.
qemu_major=$(qemu-system-x86_64 --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9]*\).*/\1/p' || true)
if [ -n "$qemu_major" ] && [ "$qemu_major" -lt 8 ]; then
  missing+=(qemu-system-x86 qemu-utils)
fi
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ]; then
  echo "deps.sh: these packages are missing and installing them needs root: ${missing[*]}" >&2
  exit 1
fi
. /etc/os-release
export DEBIAN_FRONTEND=noninteractive
update() {
  # One unreachable third-party source must not stop the rest; the install below fails if it matters.
  apt-get update -q || echo "deps.sh: apt-get update had errors; going on with the lists there are" >&2
}
update
if [ "$ID" = debian ] && [ "$VERSION_ID" = 12 ]; then
  # mirrors SUITE: the mirrors that apt takes a suite from.
  mirrors() { apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' | sed -n "s/ $1\$//p" | sort -u; }
  if [ -z "$(mirrors bookworm-backports)" ]; then
    mirror=$(mirrors bookworm | head -1)
    if [ -z "$mirror" ]; then
      echo "deps.sh: apt has no source with the suite bookworm, so it is not known which mirror has bookworm-backports; add that suite to apt's sources" >&2
      exit 1
    fi
    cat > /etc/apt/sources.list.d/fleetingd-backports.sources <<END
# QEMU for fleetingd's tests and demo: packaging/deps.sh
Types: deb
URIs: $mirror
Suites: bookworm-backports
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
END
    update
  fi
  # By the suite, not package by package: what QEMU 10 depends on (seabios, for one) comes from there too.
  apt-get install -y -q --no-install-recommends -t bookworm-backports qemu-system-x86 qemu-utils
fi
apt-get install -y -q --no-install-recommends "${missing[@]}"

#!/usr/bin/env bash
# Installs the Debian or Ubuntu packages that `make demo` and `make test` need. If all of them are installed it does nothing, and needs
# neither root nor a network.
set -euo pipefail

packages=(
  qemu-system-x86 qemu-utils # VMs, and qemu-img
  mmdebstrap e2fsprogs zstd  # guest images from a package mirror
  debian-archive-keyring     # signs the mirror; ubuntu hosts lack it
  xfsprogs                   # a file system that can clone
  iptables                   # another firewall for doctor to find
  nftables iproute2 iputils-ping
  openssh-client
  procps util-linux fdisk xz-utils cpio strace
  systemd # the tests check the generated units with its tools; it need not be running
)

missing=()
for p in "${packages[@]}"; do
  dpkg-query -W -f '${db:Status-Status}\n' "$p" 2>/dev/null | grep -qx installed || missing+=("$p")
done

# Under emulation, Debian 12's QEMU 7.2 crashes kernels from 6.12 on.
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
  # One unreachable third-party source must not stop the rest; if it matters, the install below fails.
  apt-get update -q || echo "deps.sh: apt-get update had errors; continuing with the existing lists" >&2
}
update
if [ "$ID" = debian ] && [ "$VERSION_ID" = 12 ]; then
  # mirrors ORIGIN SUITE: the mirrors that apt takes a suite from. Vendors use Debian's suite names for their own repositories, so the
  # origin counts as well.
  mirrors() {
    apt-get indextargets --format '$(ORIGIN)|$(RELEASE)|$(REPO_URI)' 'Created-By: Packages' |
      awk -F '|' -v origin="$1" -v suite="$2" '$1 == origin && $2 == suite { print $3 }' | sort -u
  }
  if [ -z "$(mirrors "Debian Backports" bookworm-backports)" ]; then
    mirror=$(mirrors Debian bookworm | head -1)
    if [ -z "$mirror" ]; then
      echo "deps.sh: apt has no source with Debian's suite bookworm, so the mirror for bookworm-backports is unknown; add that suite to apt's sources" >&2
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
  # By suite, not package by package: dependencies of QEMU 10, such as seabios, come from there too.
  apt-get install -y -q --no-install-recommends -t bookworm-backports qemu-system-x86 qemu-utils
fi
apt-get install -y -q --no-install-recommends "${missing[@]}"

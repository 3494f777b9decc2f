#!/bin/sh
# Runs on the building machine as mmdebstrap's last hook; $1 is the lab's root, $2 the folder that gets the
# kernel and initrd and has the keys, $3 the folder of the recipe.
set -eu
root=$1 out=$2 recipe=$3

echo hostlab > "$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 hostlab\n' > "$root/etc/hosts"
echo "/dev/vda / ext4 defaults 0 1" > "$root/etc/fstab"
ln -sf /run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"

install -d -m 0700 "$root/root/.ssh"
install -m 0600 "$out/id_ed25519.pub" "$root/root/.ssh/authorized_keys"
rm -f "$root"/etc/ssh/ssh_host_*
install -m 0600 "$out/host_ed25519" "$root/etc/ssh/ssh_host_ed25519_key"
install -m 0644 "$out/host_ed25519.pub" "$root/etc/ssh/ssh_host_ed25519_key.pub"

chroot "$root" groupadd --system --force kvm
chroot "$root" useradd --system --user-group --groups kvm --home-dir /var/lib/fleetingd --create-home \
	--shell /usr/sbin/nologin fleetingd

chroot "$root" systemctl enable --quiet systemd-networkd systemd-resolved hostlab-ready
# Nothing in a lab is to change by itself, its life is too short for housekeeping, and it has no screen.
chroot "$root" systemctl mask --quiet apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
	e2scrub_all.timer e2scrub_reap.service fstrim.timer xfs_scrub_all.timer \
	getty@tty1.service modprobe@drm.service modprobe@efi_pstore.service systemd-pstore.service \
	proc-sys-fs-binfmt_misc.automount systemd-binfmt.service \
	systemd-udev-load-credentials.service systemd-network-generator.service

# A lab boots with the initrd that is made here. Packages that come or go would have another one built, which
# takes more than a minute under emulation.
sed -i 's/^update_initramfs=.*/update_initramfs=no/' "$root/etc/initramfs-tools/update-initramfs.conf"

# The kernel's own modules, in the order that insmod needs.
version=$(basename "$root"/lib/modules/*)
initrd=$root/tmp/initrd
install -D "$root/bin/busybox" "$initrd/bin/busybox"
install "$recipe/init" "$initrd/init"
for m in virtio_pci virtio_blk ext4; do
	chroot "$root" modprobe --show-depends --set-version "$version" "$m"
done | while read -r verb file _; do
	[ "$verb" = insmod ] || continue # built into the kernel
	name=$(basename "$file")
	[ ! -e "$initrd/${name%.xz}" ] || continue
	case $name in
	*.xz) chroot "$root" xz -dc "$file" > "$initrd/${name%.xz}" ;;
	*) cp "$root$file" "$initrd/$name" ;;
	esac
	echo "/${name%.xz}" >> "$initrd/modules.order"
done
chroot "$root" sh -c 'cd /tmp/initrd && find . | cpio --quiet -o -H newc' > "$out/initrd"
rm -rf "$initrd"
cp "$root/boot/vmlinuz-$version" "$out/vmlinuz"

# A lab is one machine with one identity, made here and not at its first boot; and what systemd would bring up
# to date at a first boot is up to date.
tr -d - < /proc/sys/kernel/random/uuid > "$root/etc/machine-id"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
touch "$root/etc/.updated" "$root/var/.updated"

host "metal-01" {
  state_dri = "eno1" # ERROR: An argument named "state_dri" is not expected here. host "metal-01" may have: egress_interface, state_dir
  egress_interface = "a-name-of-16-byte" # ERROR: has 17 characters; an interface's name has at most 15
  state_dir = "var/lib/fleetingd" # ERROR: is a relative path. Write an absolute one
  refresh = "1d" # ERROR: "1d": the units are s, m and h: write "24h".
  nework { # ERROR: Did you mean "network"?
  }
  disks {
    backing = "xfs" # ERROR: backing must be one of "auto", "directory", "xfs-image" and "tmpfs"; got "xfs" (did you mean "xfs-image"?).
  }
  disks { # ERROR: host "metal-01" already has a disks block at testdata/findings/host.hcl:8,3-8; only one is allowed
  }
  hypervisor "qemuu" { # ERROR: "qemuu" is not a hypervisor (did you mean "qemu"?)
    binary = "./qemu" # ERROR: is not an absolute, clean path
    accel  = "hvf" # ERROR: accel must be one of "auto", "kvm" and "tcg"; got "hvf".
  }
}

host "metal-02" { # ERROR: host "metal-02" needs egress_interface. Write, for example: egress_interface = "eno1"
  state_dir = "/etc" # ERROR: Choose another folder, such as "/var/lib/fleetingd"
  refresh   = "5s"   # ERROR: Images cannot be rebuilt every 5s
  disks { # ERROR: With backing = "tmpfs", disks needs a size, the most that they may take
    backing = "tmpfs"
  }
  hypervisor "cloud-hypervisor" {
    accel  = "kvm" # ERROR: always runs on KVM. Omit accel
    binary = "bin/ch" # ERROR: is not an absolute, clean path
  }
}

host "metal-03" {
  egress_interface = "lo" # ERROR: Traffic cannot leave through lo
  state_dir        = "/srv/a b" # ERROR: has characters that systemd units would have to quote
  refresh          = 24 # ERROR: "24": the unit is missing: write "24s" or "24m"
  disks {
    backing = "directory"
    size    = "10GiB" # ERROR: backing = "directory" uses the folder's file system as it is
  }
  hypervisor "qemu" {
    accel   = "hvf" # ERROR: accel must be one of "auto", "kvm" and "tcg"; got "hvf".
    sandbox = "yes" # ERROR: Write, for example: sandbox = true
  }
  hypervisor "cloud-hypervisor" { # ERROR: host "metal-03" already has a hypervisor block at testdata/findings/host.hcl:39,3-20; only one is allowed
  }
}

host "metal-04" {
  egress_interface = "e no1" # ERROR: is not an interface name
  state_dir        = "/srv/x/" # ERROR: Write "/srv/x/" as "/srv/x".
  disks {
    backing = "xfs-image"
    size    = "100MiB" # ERROR: "1GiB" or more
  }
  hypervisor "qemu" {
    binary = "-h" # ERROR: is not the name of a program
  }
}

host "metal-05" {
  egress_interface = null # ERROR: host "metal-05" needs egress_interface; got null
  state_dir        = "/proc/x" # ERROR: cannot hold files
  disks {
    size = "0.5GiB" # ERROR: a size is a whole number: write "512MiB"
  }
}

host "Metal_06" { # ERROR: cannot be a host's name: use lower-case letters, digits and -
  egress_interface = "eno1"
  state_dir        = "/srv/0123456789012345678901234567890123456789012345678901234567890123456789012345678901234" # ERROR: may have 80
}

host "metal-01" { # ERROR: The host "metal-01" is already defined at
  egress_interface = "eno1"
}

image "i" {
  ubuntu {
    release = "noble"
  }
}

pool "p" {
  image         = image.i
  cpus          = 1
  memory        = "1GiB"
  disk          = "5GiB"
  max_instances = 1
}

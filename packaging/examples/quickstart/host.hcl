# The smallest host that runs anywhere: Debian guests built from this machine's
# own package mirror, in QEMU, with KVM if it works and emulation otherwise.
#
#   fleetingd run packaging/examples/quickstart/host.hcl -- uname -a

variable "egress_interface" {
  type        = string
  default     = "eth0"
  description = "the interface with the default route: ip route show default"
}

variable "mirror" {
  type        = string
  default     = null
  description = "a Debian mirror, where apt on this machine has none: on Ubuntu, for one"
}

host "quickstart" {
  egress_interface = var.egress_interface

  network {
    subnet = "172.16.64.0/24"
  }

  hypervisor "qemu" {}
}

image "debian" {
  debian {
    suite    = "trixie"
    mirror   = var.mirror
    packages = ["git"]
  }

  prebuild {
    run = ["git --version > /etc/motd"]
  }
}

pool "small" {
  image         = image.debian
  cpus          = 1
  memory        = "1GiB"
  disk          = "10GiB"
  start         = "cold" # warm starts, restored from memory, will come later
  max_instances = 4
}

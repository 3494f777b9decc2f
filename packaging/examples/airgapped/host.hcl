# A site without internet access: Debian guests from the site's own package mirror, or a
# disk that was built elsewhere. The token comes from the environment of the command.
#
#   FLEETINGD_VAR_gitlab_token=glrt-… fleetingd validate host.hcl

variable "gitlab_token" {
  type      = string
  sensitive = true
  default   = null
}

variable "mirror" {
  type    = string
  default = "http://deb.intranet.example.com/debian"
}

host "lab" {
  egress_interface = "enp1s0"
  refresh          = "0s" # never: images only change with the spec

  disks {
    backing = "tmpfs" # what jobs write is never on a disk
    size    = "64GiB"
  }

  network {
    subnet = "172.16.200.0/26"
    dns    = ["10.0.0.53"]

    egress "intranet" {
      action = "allow"
      to     = ["10.0.0.0/16"]
      ports  = ["udp/53", "tcp/53", "tcp/80", "tcp/443"]
    }
    egress "nothing-else" {
      action = "deny"
    }
  }

  hypervisor "qemu" {
    accel = "kvm"
  }
}

image "debian" {
  debian {
    suite    = "trixie"
    mirror   = var.mirror # security updates come from this URL with "-security" appended, unless security_mirror names another
    packages = ["git", "make", "gcc"]
  }
}

image "golden" {
  url {
    disk    = "https://images.intranet.example.com/golden/disk.qcow2"
    kernel  = "https://images.intranet.example.com/golden/vmlinuz"
    initrd  = "https://images.intranet.example.com/golden/initrd.img"
    cmdline = "root=/dev/vda1 ro console=ttyS0"
    # The digests are in SHA256SUMS next to the disk.
  }
}

image "local" {
  file {
    disk   = "/srv/images/golden.qcow2"
    kernel = "/srv/images/vmlinuz"
    initrd = "/srv/images/initrd.img"
  }
}

pool "debian" {
  image         = image.debian
  cpus          = 2
  memory        = "4GiB"
  disk          = "20GiB"
  start         = "cold"
  max_instances = 8
}

pool "golden" {
  image         = image.golden
  cpus          = 2
  memory        = "4GiB"
  disk          = "20GiB"
  start         = "cold"
  console       = true
  max_instances = 2
}

runner "debian" {
  pool  = pool.debian
  url   = "https://gitlab.intranet.example.com"
  token = var.gitlab_token

  settings = {
    tls-ca-file = "/etc/ssl/certs/intranet.pem"
    environment = ["HTTPS_PROXY="]
    autoscaler  = { instance_acquire_timeout = "10m" }
  }
}

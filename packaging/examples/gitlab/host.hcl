# A host for GitLab CI: Ubuntu workers in Cloud Hypervisor, Docker inside them, a
# fresh virtual machine for every job.
#
#   fleetingd validate host.hcl
#   fleetingd compile host.hcl -o out
#
# Put the runner's authentication token (glrt-…) where `token` says, on the host, readable only by
# root. It is read when config.toml is written.

variable "gitlab_url" {
  type    = string
  default = "https://gitlab.example.com"
}

host "ci-01" {
  egress_interface = "eno1" # ip route show default

  disks {
    backing = "xfs-image" # a file system that can clone, in a file on any disk
    size    = "400GiB"
  }

  network {
    subnet = "172.16.120.0/24" # room for 254 workers

    # Workers can only reach the internet, and no private addresses. This is the exception.
    egress "registry" {
      action = "allow"
      to     = ["10.20.0.15/32"]
      ports  = ["tcp/443"]
    }
  }

  # What Debian and Ubuntu do not have. The rest (qemu-utils, xfsprogs …) comes from the host's own sources.
  install {
    package "gitlab-runner" {
      apt     = "https://packages.gitlab.com/runner/gitlab-runner/debian trixie main" # on Ubuntu: …/ubuntu noble main
      key     = "F640 3F65 44A3 8863 DAA0 B6E0 3F01 618A 5131 2F3F"
      key_url = "https://packages.gitlab.com/runner/gitlab-runner/gpgkey"
    }
    # package "cloud-hypervisor" {
    #   file   = "https://github.com/cloud-hypervisor/cloud-hypervisor/releases/download/v53.0/cloud-hypervisor-static"
    #   sha256 = "…" # of that file, as you have checked it
    # }
  }
}

image "ubuntu" {
  ubuntu {
    release = "noble"
  }

  prebuild {
    packages = ["git", "git-lfs", "docker.io"]
    run = [
      "usermod -aG docker ubuntu",
      "docker pull alpine:3",
    ]
  }
}

pool "small" {
  image         = image.ubuntu
  cpus          = 4
  memory        = "8GiB"
  disk          = "40GiB"
  max_instances = 20
}

pool "large" {
  image         = image.ubuntu
  cpus          = 16
  memory        = "64GiB"
  disk          = "200GiB"
  max_instances = 2

  limits {
    cpu_quota = "1200%" # leaves CPUs for the small ones
  }
}

runner "small" {
  pool  = pool.small
  url   = var.gitlab_url
  token = file("/run/secrets/gitlab-token-small")

  policy {
    idle_count = 2
    idle_time  = "10m"
  }
  policy {
    periods    = ["* 8-18 * * mon-fri"]
    timezone   = "Europe/Berlin"
    idle_count = 8
    idle_time  = "30m"
  }
}

runner "large" {
  pool     = pool.large
  url      = var.gitlab_url
  token    = file("/run/secrets/gitlab-token-large")
  executor = "docker-autoscaler" # jobs run in containers, in their own VM

  settings = {
    docker = { image = "alpine:3" }
  }
}

# Several hosts with one spec. GitLab is the scheduler: runners with the same token share a
# queue, so another host is another host block.
#
#   fleetingd validate host.hcl
#   fleetingd compile host.hcl --host metal-02 -o out
#
# On a host called metal-01 or metal-02, --host can be omitted.

variable "gitlab_url" {
  type    = string
  default = "https://gitlab.example.com"
}

locals {
  workers = 40
  site    = "10.64.0.0/16" # routed between the hosts, so each has its own subnet
}

host "metal-01" {
  egress_interface = "eno1"

  network {
    subnet = cidrsubnet(local.site, 8, 1)
    dns    = [cidrhost("10.20.0.0/24", 53)]

    egress "dns" {
      action = "allow"
      to     = ["10.20.0.53/32"]
      ports  = ["udp/53", "tcp/53"]
    }
  }
}

host "metal-02" {
  egress_interface = "bond0"
  refresh          = "168h" # once a week

  disks {
    backing = "directory" # /srv/fleetingd is already on XFS
  }
  state_dir = "/srv/fleetingd"

  network {
    subnet  = cidrsubnet(local.site, 8, 2)
    subnet6 = "fd7e:1ee7:2::/64"
    mtu     = 9000
  }
}

image "ubuntu" {
  ubuntu {
    release = "noble"
  }

  prebuild {
    packages = ["git", "podman"]

    file "/etc/containers/registries.conf.d/mirror.conf" {
      content = file("mirror.conf")
    }
  }
}

pool "small" {
  image         = image.ubuntu
  cpus          = 4
  memory        = "8GiB"
  disk          = "30GiB"
  max_instances = local.workers
}

runner "small" {
  pool  = pool.small
  url   = var.gitlab_url
  token = file("/run/secrets/gitlab-token")

  policy {
    idle_count   = 4
    idle_time    = "5m"
    scale_factor = 1.2
  }
}

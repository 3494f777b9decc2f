# The full language, by example. A host needs little of it: values marked
# (default) and blocks marked (optional) can be omitted.

variable "gitlab_url" {
  type    = string
  default = "https://gitlab.example.com"
}

locals {
  domain = "ci.example.com"
}

host "metal-01" {                         # label: the host's name
  egress_interface = "eno1"               # where worker traffic leaves the host; must exist
  state_dir        = "/var/lib/fleetingd" # (default)

  disks {              # (optional) where clones live
    backing = "auto"   # (default) auto | directory | xfs-image | tmpfs
    size    = "200GiB" # xfs-image and tmpfs only
  }

  network {                          # (optional)
    subnet  = "172.16.120.0/22"      # one address per worker: /22 holds 1,022 workers
    subnet6 = "fd7e:1ee7::/64"       # (optional) without it, workers have no IPv6
    dns     = ["1.1.1.3", "1.0.0.3"] # (default)
    mtu     = 1500                   # (default)

    # What workers can reach. The first match wins. By default that is the internet,
    # but nothing private: no LAN, no link-local addresses, no cloud
    # metadata, no other workers, nothing on the host itself.
    egress "artifact-store" {
      action = "allow"
      to     = ["10.20.0.15/32"]
      ports  = ["tcp/443", "tcp/9000-9001"]
    }
    egress "no-smtp" {
      action = "deny"
      ports  = ["tcp/25"]
    }
  }

  hypervisor "cloud-hypervisor" { # (default) "qemu" runs anywhere, even without KVM
    binary  = "cloud-hypervisor"  # (default) found on PATH
    sandbox = true                # (default) seccomp and landlock
  }

  refresh = "24h" # (default) rebuild images in the background

  gitlab_runner {         # (optional) config.toml's global settings, by their own names
    concurrent       = 40 # (default) the sum of the runner blocks
    shutdown_timeout = 3600
    listen_address   = "127.0.0.1:9252"
    session_server   = { listen_address = "[::]:8093", advertise_address = "ci.example.com:8093" }
  }

  install { # (optional) packages from elsewhere; the distribution's own are installed anyway, unless install = false
    package "gitlab-runner" {
      apt     = "https://packages.example.com/runner trixie main"
      key     = "F640 3F65 44A3 8863 DAA0 B6E0 3F01 618A 5131 2F3F" # the fingerprint of the key that signs the repository
      key_url = "https://packages.example.com/runner/key.asc"
    }
    package "cloud-hypervisor" { # a program for /usr/local/bin, or a .deb
      file   = "https://example.com/cloud-hypervisor-static"
      sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
    }
  }
}

image "ubuntu" {
  ubuntu { # cloud image; SHA256SUMS verified against Canonical's key
    release = "noble"
  }
  # or:  url    { disk = "https://…" kernel = "https://…" initrd = "…" sha256 = "…" }
  # or:  file   { disk = "/srv/golden.qcow2" kernel = "…" initrd = "…" }
  # or:  debian { suite = "trixie" mirror = "https://…" security_mirror = "https://…" packages = ["git"] }  # built from a package mirror: air-gapped sites

  prebuild { # (optional) what every worker starts with
    packages = ["git", "build-essential", "podman"]
    run = [ # scripts, run by bash -e -o pipefail, or by the program on their "#!" line
      "curl -fsSL https://get.docker.com | sh",
      "usermod -aG docker ubuntu",
    ]
    file "/etc/docker/daemon.json" {
      content = jsonencode({ features = { buildkit = true, containerd-snapshotter = true } })
      mode    = "0644"
    }
    file "/root/.netrc" { # secrets are sent to the guest when the image is built; every job can read them there
      content = "machine git.example.com login ci password ${file("/run/secrets/git-password")}"
      mode    = "0600"
    }
    timeout = "30m" # (default)
  }
  user = "ubuntu" # (default) the account that jobs run as
}

pool "small" {
  image   = image.ubuntu
  cpus    = 4
  memory  = "8GiB"
  disk    = "30GiB" # sparse
  start   = "warm"  # (default) warm: restored from memory; cold: booted
  console = false   # (default) true keeps each worker's console log

  max_instances = 20
  limits { # (optional) per worker, enforced by the kernel
    cpu_quota    = "400%"
    disk_iops    = 5000
    network_mbps = 500
    connections  = 16384 # (default) conntrack entries
  }
}

runner "small" { # one [[runners]] section of config.toml
  pool     = pool.small
  url      = var.gitlab_url
  token    = file("/run/secrets/gitlab-token") # read when it is written; never in a plan, a state or a log
  executor = "instance"                        # (default) or "docker-autoscaler"

  capacity_per_instance = 1 # (default)
  max_use_count         = 1 # (default) a new VM for every job
  policy {
    idle_count = 4
    idle_time  = "5m"
  }
  policy {
    periods    = ["* 8-18 * * mon-fri"]
    timezone   = "Europe/Berlin"
    idle_count = 10
    idle_time  = "20m"
  }

  # Any other gitlab-runner setting, by its own name and in its own place. Secrets are references here, too: file(), env() and
  # sensitive variables, alone or within a text.
  settings = {
    id               = 42 # GitLab's number for this runner, which resuming suspended environments needs
    feature_flags    = { FF_USE_FASTZIP = true }
    environment      = ["DOCKER_AUTH_CONFIG=${file("/run/secrets/docker-auth.json")}"]
    pre_build_script = "echo $CI_REGISTRY_PASSWORD | docker login -u $CI_REGISTRY_USER --password-stdin $CI_REGISTRY"
  }
}

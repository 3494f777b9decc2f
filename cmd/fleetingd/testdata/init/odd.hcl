# A host for GitLab CI, written by fleetingd init on metal-01.example.com, Evil "Linux" }\x1b[2J ${x}.
# It had 32 CPUs, 128.0 GiB of memory, and 900.0 GiB free for /var/lib/fleetingd. Change what you like, then:
#   fleetingd validate host.hcl # is it right?
#   fleetingd doctor host.hcl # does this machine have what it needs?

host "metal-01.example.com" {
  egress_interface = "br-lan.7" # the interface of this machine's default route

  disks {
    backing = "directory" # the file system of /var/lib/fleetingd can clone files
  }

  network {
    subnet = "172.16.120.0/22" # one address per worker; unused on this machine
  }
}

image "ubuntu" {
  ubuntu { # Canonical's cloud image; its checksum is verified against Canonical's key
    release = "noble"
  }

  prebuild { # what every worker starts with
    packages = ["build-essential", "ca-certificates", "curl", "git"]
    # Jobs need gitlab-runner in the VM for caches and artifacts.
    run = [
      "DEBIAN_FRONTEND=noninteractive apt-get -y upgrade",
      "curl -fsSL \"https://packages.gitlab.com/install/repositories/runner/gitlab-runner/script.deb.sh\" | os=ubuntu dist=noble bash",
      "DEBIAN_FRONTEND=noninteractive apt-get -y install gitlab-runner",
    ]
  }
}

pool "default" {
  image  = image.ubuntu
  cpus   = 4       # of 32; two virtual CPUs for each real one
  memory = "7GiB"  # all workers fit in 128.0 GiB, with room for the host
  disk   = "40GiB" # sparse: it takes what jobs write
  start  = "cold"

  max_instances = 16
}

runner "default" {
  pool     = pool.default
  url      = "https://gitlab.example.com"
  token    = file("/root/$${token}\"file") # read when config.toml is written; never in the spec, a plan or a log
  executor = "instance"                    # jobs run in the VM's shell; "docker-autoscaler" runs each in a container there

  max_use_count = 1 # a fresh VM for each job
  policy {
    idle_count = 4 # ready for the next jobs
    idle_time  = "10m"
  }
}

# A host for GitLab CI, written by fleetingd init on Pi_4!.
# It had 2 CPUs, 6.0 GiB of memory, and 60.0 GiB free for /var/lib/fleetingd. Change what you like, then:
#   fleetingd validate host.hcl # is it right?
#   fleetingd doctor host.hcl # does this machine have what it needs?

host "localhost" {
  egress_interface = "eno1" # the interface of this machine's default route

  disks {
    # The file system of /var/lib/fleetingd cannot clone files, so clones live in an XFS image there.
    backing = "xfs-image"
    size    = "48GiB" # of 60.0 GiB free; sparse
  }

  network {
    subnet = "172.16.120.0/22" # one address per worker; unused on this machine
  }
}

image "ubuntu" {
  ubuntu { # Canonical's cloud image; its checksum is verified against Canonical's key
    release = "noble"
    arch    = "arm64"
  }

  prebuild { # what every worker starts with
    packages = ["ca-certificates", "curl", "git"]
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
  cpus   = 2       # of 2; two virtual CPUs for each real one
  memory = "2GiB"  # all workers fit in 6.0 GiB, with room for the host
  disk   = "24GiB" # sparse: it takes what jobs write
  start  = "cold"

  max_instances = 2
}

runner "default" {
  pool     = pool.default
  url      = "https://gitlab.example.com"
  token    = file("/etc/fleetingd/gitlab-token") # read when config.toml is written; never in the spec, a plan or a log
  executor = "instance"                          # jobs run in the VM's shell; "docker-autoscaler" runs each in a container there

  max_use_count = 1 # a fresh VM for each job
  policy {
    idle_count = 1 # ready for the next jobs
    idle_time  = "10m"
  }
}
